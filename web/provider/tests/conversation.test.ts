/** What a page sees, without a network. */

import { describe, expect, it } from 'vitest'
import * as Y from 'yjs'
import {
  type Change,
  type Client,
  type Conversation,
  MemoryStore,
  openClient
} from '../src/index.js'
import type { Message, Tabs } from '../src/tabs.js'
import { FakeTime } from './fakes.js'

let seeds = 100

const client = (store = new MemoryStore(), tabs?: Tabs): Promise<Client> =>
  openClient(
    {
      url: 'http://nowhere/',
      token: 'opaque',
      principal: 'olga',
      device: 'phone',
      offline: true,
      store,
      ...(tabs === undefined ? {} : { tabs })
    },
    new FakeTime(++seeds)
  )

const create = async (): Promise<Conversation> => (await client()).create({ title: 'T' })
const texts = (one: Conversation): string[] => one.entries().map(entry => entry.content)
const turn = (): Promise<void> => new Promise(resolve => setTimeout(resolve, 0))

/** Collects the changes of a conversation. */
const listen = (one: Conversation): Change[] => {
  const heard: Change[] = []
  one.on('change', change => heard.push(change))
  return heard
}

describe('writing', () => {
  it('branches where it is meant to, and looks there', async () => {
    const one = await create()
    const { entry, slot } = await one.ask('first')
    expect(one.view()).toEqual([entry, slot])
    const again = await one.regenerate(slot, { temperature: 0 })
    expect(one.view()).toEqual([entry, again])
    expect(one.siblings(again)).toEqual([slot, again])
    expect(one.looking).toBe(again)
    expect(one.meta.head).toBe(again)
    const edited = await one.edit(entry, 'better')
    expect(texts(one)).toEqual(['better', ''])
    const branches = one.branches().map(branch => [branch.tip, branch.parent, branch.shown])
    expect(branches[0]).toEqual([slot, '', false])
    expect(new Map(branches.map(([tip, ...rest]) => [tip, rest]))).toEqual(
      new Map([
        [slot, ['', false]],
        [again, [entry, false]],
        [edited.slot, ['', true]]
      ])
    )
    one.look(slot)
    expect(texts(one)).toEqual(['first', ''])
    await one.send('goes on here')
    expect(texts(one)).toEqual(['first', '', 'goes on here'])
    await one.send('a branch', { after: entry })
    expect(texts(one)).toEqual(['first', 'a branch'])
    await one.setHead(null)
    expect(one.looking).toBeNull()
    expect(texts(one)).toEqual(['first', '', 'goes on here'])
  })

  it('refuses at once what no relay would take', async () => {
    const one = await create()
    const { entry, slot } = await one.ask('a')
    const misuses: Promise<unknown>[] = [
      one.send('x'.repeat((1 << 20) + 1)),
      one.ask('x', { params: { temperature: 101 } }),
      one.ask('x', { params: { stop: [''] } }),
      one.ask('x', { params: { unheard_of: 1 } as never }),
      one.edit(slot, 'x'),
      one.stop(entry),
      one.regenerate(entry),
      one.continue(slot),
      one.redact('0'.repeat(26)),
      one.send('x', { after: '0'.repeat(26) }),
      one.rename('x'.repeat(501)),
      one.share('', 'writer'),
      one.share('olga', 'reader'),
      one.leave(),
      one.setPolicy({ reply: 'never' as never }),
      one.resend('nothing')
    ]
    for (const misuse of misuses) await expect(misuse).rejects.toMatchObject({ code: 'misuse' })
    expect(one.view()).toEqual([entry, slot])
    expect(one.status.unsent).toBe(2) // the birth and the question
  })

  it('makes text of what is none', async () => {
    const one = await create()
    await one.send('half a \ud83c character')
    expect(texts(one)).toEqual(['half a \ufffd character'])
  })

  it('needs to know who writes', async () => {
    const unknown = await openClient({
      url: 'http://nowhere/',
      token: 'opaque',
      offline: true,
      store: new MemoryStore()
    })
    const one = await unknown.open('A'.repeat(22))
    expect(one.isEmpty).toBe(true)
    await expect(one.send('x')).rejects.toMatchObject({ code: 'offline' })
    await unknown.close()
  })
})

describe('listening', () => {
  it('hears what changed, once a turn, and nothing of what did not', async () => {
    const one = await create()
    const heard = listen(one)
    const first = await one.send('a')
    const second = await one.send('b')
    await turn()
    expect(heard.flatMap(change => [...change.entries])).toEqual([first, second])
    expect(heard.every(change => change.structure && !change.meta)).toBe(true)
    await one.rename('N')
    await turn()
    expect(heard.at(-1)).toEqual({ entries: new Set(), structure: false, meta: true })
  })

  it('hears of an entry that stands otherwise because of another', async () => {
    const one = await create()
    const { slot } = await one.ask('a')
    await turn()
    const heard = listen(one)
    await one.request()
    await turn()
    expect(one.view()).toHaveLength(2) // the first request was taken over
    expect(heard.flatMap(change => [...change.entries])).not.toContain(slot) // still unsent, though
    expect(one.entry(slot)?.standing).toBe('unsent')
  })
})

it('costs nothing but the one entry when a reply of a long conversation grows', async () => {
  const store = new MemoryStore()
  const remote = new Y.Doc()
  const entries = remote.getMap('entries')
  const id = (n: number): string => n.toString().padStart(26, '0')
  const text = new Y.Text()
  remote.transact(() => {
    for (let n = 0; n < 2_000; n++) {
      const last = n === 1_999
      entries.set(
        id(n),
        new Y.Map<unknown>([
          [
            'born',
            {
              role: last ? 'assistant' : 'user',
              author: 'olga',
              clock: n + 1,
              after: n ? id(n - 1) : ''
            }
          ],
          ['content', last ? text : 'x'],
          ['place', { parent: n ? id(n - 1) : '', epoch: 1 }],
          ...(last ? ([['state', 'streaming']] as const) : [])
        ])
      )
    }
  })
  const conversation = 'B'.repeat(22)
  await store.write(conversation, [
    { step: 'append', update: Y.encodeStateAsUpdate(remote), cursor: null }
  ])
  const one = await (await client(store)).open(conversation)
  const [view, all] = [one.view(), one.entries()]
  expect(view).toHaveLength(2_000)
  const heard = listen(one)
  const { replica } = one as unknown as {
    replica: { document: { apply(update: Uint8Array): void } }
  }
  remote.on('update', (update: Uint8Array) => replica.document.apply(update))
  text.insert(0, 'a token')
  await turn()
  expect(heard).toEqual([{ entries: new Set([id(1_999)]), structure: false, meta: false }])
  expect(one.view()).toBe(view)
  expect(one.entries().filter((entry, i) => entry !== all[i])).toMatchObject([
    { content: 'a token' }
  ])
})

describe('taking away', () => {
  it('gives what is shown as Markdown, with markers', async () => {
    const one = await create()
    await one.send('be brief', { role: 'system' })
    const secret = await one.send('a secret')
    await one.send('*hello*')
    await one.redact(secret)
    expect(one.export('markdown')).toBe(
      '# T\n\n## olga (system)\n\nbe brief\n\n## olga\n\n*hello*\n'
    )
    expect(one.export('json')).not.toContain('a secret')
  })

  it('gives everything as JSON, branches too', async () => {
    const one = await create()
    const { entry, slot } = await one.ask('a')
    const edited = await one.edit(entry, 'b')
    const exported = JSON.parse(one.export('json'))
    expect(exported).toMatchObject({
      format: 'crdt-llm conversation 1',
      id: one.id,
      meta: { title: 'T', owner: 'olga' },
      access: { olga: 'owner' },
      view: [edited.entry, edited.slot],
      entries: { [entry]: { content: 'a' }, [slot]: { isSlot: true } }
    })
  })
})

describe('two tabs of one browser, offline', () => {
  /** Tabs that hear each other, of which one may be gone. */
  const browser = (): { tab(name: string): Tabs; gone: Set<string> } => {
    const listeners = new Map<string, (message: Message) => void>()
    const gone = new Set<string>()
    return {
      gone,
      tab: name => ({
        tab: name,
        isGone: async other => gone.has(other),
        post: message => {
          for (const [other, listener] of listeners)
            if (other !== name) listener(structuredClone(message))
        },
        listen: listener => {
          listeners.set(name, listener)
        },
        close: () => {
          gone.add(name)
          listeners.delete(name)
        }
      })
    }
  }

  it('see each other at once, and again after a reload', async () => {
    const [store, tabs] = [new MemoryStore(), browser()]
    const [left, right] = [
      await client(store, tabs.tab('left')),
      await client(store, tabs.tab('right'))
    ]
    const one = await left.create({ title: 'shared' })
    await one.send('from the left')
    const two = await right.open(one.id)
    expect(texts(two)).toEqual(['from the left'])
    await two.send('from the right')
    expect(texts(one)).toEqual(['from the left', 'from the right'])
    expect(one.entries().map(entry => entry.standing)).toEqual(['unsent', 'unsent'])
    expect([one.status.unsent, two.status.unsent]).toEqual([2, 1]) // each sends its own
    await right.close()
    await left.close()
    const again = await (await client(store, tabs.tab('later'))).open(one.id)
    expect(texts(again)).toEqual(['from the left', 'from the right'])
    expect(again.status.unsent).toBe(3) // both tabs are gone: what they left is adopted
  })
})

describe('a client', () => {
  it('gives the same object for the same conversation, and forgets it when told', async () => {
    const store = new MemoryStore()
    const here = await client(store)
    const one = await here.create()
    expect(await Promise.all([here.open(one.id), here.open(one.id)])).toEqual([one, one])
    await one.close()
    await expect(one.send('x')).rejects.toMatchObject({ code: 'misuse' })
    const other = await here.open(one.id)
    expect(other).not.toBe(one)
    await here.forget(one.id)
    expect(here.list).toEqual([])
    expect(await store.waiting()).toEqual([])
    await expect(here.open('no id')).rejects.toMatchObject({ code: 'misuse' })
    await expect(here.archive(one.id, true)).rejects.toMatchObject({ code: 'offline' })
    await here.close()
    expect(here.status.state).toBe('closed')
  })

  it('goes on without storage, and says so', async () => {
    const store = new MemoryStore()
    const here = await client(store)
    const problems: string[] = []
    here.on('store', ({ reason }) => problems.push(reason))
    store.write = () => Promise.reject(new Error('the disk is full'))
    const one = await here.create()
    await one.send('still here')
    expect(texts(one)).toEqual(['still here'])
    expect(problems[0]).toBe('the disk is full')
  })
})
