import 'fake-indexeddb/auto'
import { describe, expect, it } from 'vitest'
import type { Intent } from '../src/document.js'
import { IndexedDbStore } from '../src/indexeddb.js'
import { MemoryStore, NO_PROFILE, type Profile, type Row, type Store } from '../src/store.js'

const intent: Intent = { kind: 'stop', slot: 's' }
const row = (id: string, order: number, tab = 'one'): Row => ({
  id,
  tab,
  order,
  intent,
  update: Uint8Array.of(order)
})
const bytes = (...values: number[]): Uint8Array => Uint8Array.from(values)
let databases = 0

const stores: [string, () => Promise<[Store, () => Promise<Store>]>][] = [
  [
    'memory',
    async () => {
      const store = new MemoryStore()
      return [store, async () => store]
    }
  ],
  [
    'IndexedDB',
    async () => {
      const name = `test ${databases++}`
      const again = (): Promise<Store> => IndexedDbStore.open(name)
      return [await again(), again]
    }
  ]
]

describe.each(stores)('what is kept in %s', (_, make) => {
  it('is there again, in order, conversation by conversation', async () => {
    const [store, again] = await make()
    await store.write('a', [
      { step: 'append', update: bytes(1), cursor: { log: 'l', lsn: 1 } },
      { step: 'put', row: row('y', 2) },
      { step: 'put', row: row('x', 1) },
      { step: 'refuse', refused: { id: 'r', intent, code: 'denied', rule: '', reason: '', at: 1 } }
    ])
    await store.write('b', [{ step: 'append', update: bytes(9), cursor: null }])
    await store.close()
    const other = await again()
    const kept = await other.load('a')
    expect(kept).toMatchObject({ updates: [bytes(1)], cursor: { log: 'l', lsn: 1 } })
    expect(kept.outbox.map(one => one.id)).toEqual(['x', 'y'])
    expect(kept.refused.map(one => one.id)).toEqual(['r'])
    expect(await other.waiting()).toEqual(['a'])
    await other.write('a', [
      { step: 'drop', row: 'x' },
      { step: 'drop', row: 'y' },
      { step: 'discard', refused: 'r' }
    ])
    expect(await other.load('a')).toMatchObject({ outbox: [], refused: [] })
    await other.forget('a')
    expect(await other.load('a')).toEqual({ updates: [], cursor: null, outbox: [], refused: [] })
    expect((await other.load('b')).updates).toEqual([bytes(9)])
  })

  it('leaves out what another tab kept already, but never an own write', async () => {
    const [store] = await make()
    const append = (update: number, log: string, lsn: number): Promise<void> =>
      store.write('a', [{ step: 'append', update: bytes(update), cursor: { log, lsn } }])
    await append(1, 'l', 5)
    await append(2, 'l', 5)
    await append(3, 'l', 4)
    await append(4, 'm', 1)
    await store.write('a', [{ step: 'append', update: bytes(5), cursor: null }])
    expect(await store.load('a')).toMatchObject({
      updates: [bytes(1), bytes(4), bytes(5)],
      cursor: { log: 'm', lsn: 1 }
    })
  })

  it('puts together what is there, whoever kept it', async () => {
    const [store, again] = await make()
    const other = await again()
    for (const [which, update] of [
      [store, 1],
      [other, 2]
    ] as const) {
      await which.write('a', [{ step: 'append', update: bytes(update), cursor: null }])
    }
    await store.compact('a', updates => bytes(...updates.flatMap(one => [...one])))
    expect((await other.load('a')).updates).toEqual([bytes(1, 2)])
  })

  it('gives what a tab left to exactly one other', async () => {
    const [store] = await make()
    await store.write('a', [
      { step: 'put', row: row('x', 1, 'gone') },
      { step: 'put', row: row('y', 2, 'alive') }
    ])
    const taken = await Promise.all([
      store.adopt('a', ['gone'], 'two'),
      store.adopt('a', ['gone'], 'three')
    ])
    expect(taken.map(rows => rows.length).sort()).toEqual([0, 1])
    expect((await store.load('a')).outbox.map(one => one.tab).sort()).toEqual(
      ['alive', taken[0]?.length ? 'two' : 'three'].sort()
    )
  })

  it('knows who we are', async () => {
    const [store, again] = await make()
    expect(await store.profile()).toEqual(NO_PROFILE)
    const profile: Profile = {
      principal: 'olga',
      relay: bytes(1),
      listed: new Map([
        [
          'a',
          { title: 't', role: 'owner', owner: 'o', created_at: 1, changed_at: 2, archived: false }
        ]
      ]),
      local: new Map()
    }
    await store.saveProfile(profile)
    expect(await (await again()).profile()).toEqual(profile)
  })
})

it('says so when the database cannot be used', async () => {
  const store = await IndexedDbStore.open('closed')
  await store.close()
  await expect(store.load('a')).rejects.toMatchObject({ code: 'store' })
})
