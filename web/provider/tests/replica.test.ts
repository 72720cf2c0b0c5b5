/** What is sent when, and what acknowledgements and refusals do: against a relay of a few lines. */

import { describe, expect, it } from 'vitest'
import * as Y from 'yjs'
import { clocksOf, Document, type Intent } from '../src/document.js'
import type { Code, FromClient } from '../src/frames.js'
import { IN_FLIGHT_MAX, type Port, Replica } from '../src/replica.js'
import { entryId, ROOT } from '../src/schema.js'
import { encodeStateVector } from '../src/state-vector.js'
import { type Kept, MemoryStore, type Row, type Step } from '../src/store.js'
import { FakeTime } from './fakes.js'

const ID = 'A'.repeat(22)
const NOTHING: Kept = { updates: [], cursor: null, outbox: [], refused: [] }

type Update = FromClient & { kind: 'update' }

let worlds = 0

/** A replica, everything that it did, and what a relay would know. */
class World {
  readonly time: FakeTime
  readonly store = new MemoryStore()
  readonly sent: FromClient[] = []
  readonly told = {
    settled: [] as [string[], boolean][],
    wrote: [] as Row[],
    stuck: '',
    compacted: 0
  }
  readonly relay = new Document(7)
  resumeIn: number | null = null
  lsn = 0
  replica: Replica

  constructor(kept: Kept = NOTHING, tab = 'tab') {
    this.time = new FakeTime(++worlds)
    this.replica = this.make(kept, tab)
  }

  private make(kept: Kept, tab: string): Replica {
    const port: Port = {
      send: frame => this.sent.push(frame),
      keep: (steps: readonly Step[]) => void this.store.write(ID, steps),
      compact: () => {
        this.told.compacted++
      },
      wrote: rows => this.told.wrote.push(...rows),
      settled: (rows, refused) => this.told.settled.push([[...rows], refused]),
      resumeIn: ms => {
        this.resumeIn = ms
      },
      stuck: reason => {
        this.told.stuck = reason
      },
      changed: () => undefined,
      rebuilt: () => undefined,
      status: () => undefined,
      presence: () => undefined,
      refused: () => undefined
    }
    const author = (): { principal: string; device: string } => ({ principal: 'olga', device: 'd' })
    return new Replica(ID, tab, kept, author, this.time, port)
  }

  /** The page is loaded again. */
  async reload(): Promise<void> {
    this.replica = this.make(await this.store.load(ID), 'tab')
    this.sent.length = 0
  }

  say(n: number, more: Partial<Intent & { kind: 'entry' }> = {}): string {
    const id = entryId(n, bytes => bytes.fill(0))
    this.replica.write({
      kind: 'entry',
      id,
      role: 'user',
      text: `text ${n}`,
      call: null,
      after: this.replica.document.tree.last(ROOT),
      fork: false,
      at: n,
      slot: null,
      head: false,
      ...more
    })
    return id
  }

  open(log = 'log'): void {
    this.replica.attach(1)
    const [asked] = this.sent.splice(0)
    if (asked?.kind !== 'open') throw new Error('nothing was opened')
    this.replica.receive({
      kind: 'opened',
      channel: 1,
      log,
      lsn: this.lsn,
      update: this.relay.diff(asked.stateVector),
      stateVector: encodeStateVector(this.relay.stateVector()),
      grant: 'owner',
      behind: false
    })
  }

  get updates(): Update[] {
    return this.sent.filter((one): one is Update => one.kind === 'update')
  }

  /** The relay takes an update; the answer may get lost. */
  take({ update, id }: Update, answer = true): void {
    this.relay.apply(update)
    this.lsn++
    if (answer) this.replica.receive({ kind: 'ack', channel: 1, id, lsn: this.lsn })
  }

  refuse({ id }: Update, code: Code, retryMs: number | null = null): void {
    this.replica.receive({
      kind: 'nack',
      channel: 1,
      id,
      code,
      rule: 'rule',
      reason: 'because',
      retryMs,
      stateVector: code === 'gap' ? encodeStateVector(this.relay.stateVector()) : null
    })
  }

  get texts(): string[] {
    const { document } = this.replica
    return document.tree.view().map(id => document.entry(id, false)?.content ?? '')
  }

  get relayTexts(): string[] {
    return this.relay.tree.view().map(id => this.relay.entry(id, false)?.content ?? '')
  }
}

const at = <T>(list: readonly T[], index: number): T => {
  const found = list.at(index)
  if (found === undefined) throw new Error(`nothing at ${index}`)
  return found
}

describe('an open conversation', () => {
  it('sends what was written offline, and keeps it apart until it is acknowledged', async () => {
    const world = new World()
    world.say(1)
    world.say(2)
    world.open()
    expect(world.updates.map(one => one.id)).toEqual([1, 2])
    expect((await world.store.load(ID)).updates).toHaveLength(1) // what Opened brought
    world.take(at(world.updates, 0))
    expect(world.replica.waiting).toBe(1)
    const kept = await world.store.load(ID)
    expect([kept.updates.length, kept.outbox.length]).toEqual([2, 1])
    world.take(at(world.updates, 1))
    expect(world.relayTexts).toEqual(['text 1', 'text 2'])
    expect(world.told.settled.map(([, refused]) => refused)).toEqual([false, false])
  })

  it('takes one acknowledgement for all before it', () => {
    const world = new World()
    world.open()
    for (let n = 1; n <= 3; n++) world.say(n)
    for (const update of world.updates) world.take(update, update.id === 3)
    expect(world.replica.waiting).toBe(0)
  })

  it('has a bounded number of updates under way', () => {
    const world = new World()
    for (let n = 1; n <= IN_FLIGHT_MAX + 3; n++) world.say(n)
    world.open()
    expect(world.updates).toHaveLength(IN_FLIGHT_MAX)
    for (const update of world.updates) world.take(update)
    expect(world.updates).toHaveLength(IN_FLIGHT_MAX + 3)
  })

  it('does not send again what the relay has though its answer got lost', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.take(at(world.updates, 0), false)
    world.replica.detach()
    world.say(2)
    world.sent.length = 0
    world.open()
    expect(world.updates).toHaveLength(1)
    world.take(at(world.updates, 0))
    expect(world.relayTexts).toEqual(['text 1', 'text 2'])
    expect(world.replica.waiting).toBe(0)
  })

  it('sends the same bytes again after a reload, under another client id', async () => {
    const world = new World()
    world.say(1)
    const { clientId } = world.replica.document
    await world.reload()
    expect(world.replica.document.clientId).not.toBe(clientId)
    expect(world.texts).toEqual(['text 1'])
    world.open()
    expect([...clocksOf(at(world.updates, 0).update).to.keys()]).toEqual([clientId])
  })

  it('asks for what it lacks, and shows nothing that builds on it', () => {
    const world = new World()
    world.open()
    const other = new World()
    const updates = [1, 2].map(n => {
      other.say(n)
      return at(other.told.wrote, -1).update
    })
    world.sent.length = 0
    world.replica.receive({ kind: 'change', channel: 1, lsn: 2, update: at(updates, 1) })
    expect(world.sent).toMatchObject([{ kind: 'pull', channel: 1 }])
    expect(world.texts).toEqual([])
    world.replica.receive({
      kind: 'state',
      channel: 1,
      lsn: 2,
      update: other.replica.document.diff()
    })
    expect(world.texts).toEqual(['text 1', 'text 2'])
  })

  it('tells the relay from where on it lacks something', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.take(at(world.updates, 0)) // one write, one line of the log
    world.replica.detach()
    world.sent.length = 0
    world.replica.attach(2)
    expect(world.sent).toMatchObject([{ kind: 'open', log: 'log', lsn: 1 }])
  })

  it('stays where it was when others may have written in between', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.lsn++ // somebody else's, which did not come here yet
    world.take(at(world.updates, 0))
    world.replica.detach()
    world.sent.length = 0
    world.replica.attach(2)
    expect(world.sent).toMatchObject([{ kind: 'open', lsn: 0 }])
  })
})

describe('a refusal', () => {
  it('keeps the text, and writes what built on it anew under a fresh client id', async () => {
    const world = new World()
    world.open()
    for (let n = 1; n <= 4; n++) world.say(n)
    const { clientId } = world.replica.document
    const [first, second, third, fourth] = world.updates
    world.take(first as Update)
    world.sent.length = 0
    world.refuse(second as Update, 'denied')
    expect(world.replica.refused).toMatchObject([
      { code: 'denied', rule: 'rule', reason: 'because', intent: { text: 'text 2' } }
    ])
    expect(world.replica.document.clientId).not.toBe(clientId)
    expect(world.texts).toEqual(['text 1', 'text 3', 'text 4'])
    expect(world.updates).toHaveLength(2)
    // What was under way behind it is answered too, and that means nothing any more.
    world.refuse(third as Update, 'gap')
    world.refuse(fourth as Update, 'gap')
    expect(world.updates).toHaveLength(2)
    for (const update of [...world.updates]) world.take(update)
    expect(world.relayTexts).toEqual(['text 1', 'text 3', 'text 4'])
    await world.reload()
    expect(world.replica.refused).toMatchObject([{ intent: { text: 'text 2' } }])
    expect(world.replica.waiting).toBe(0)
    expect(world.replica.discard(at(world.replica.refused, 0).id)).toMatchObject({ text: 'text 2' })
    await world.reload()
    expect(world.replica.refused).toEqual([])
  })

  it('lets go of what only made sense with it', () => {
    const world = new World()
    world.open()
    const slot = entryId(9, bytes => bytes.fill(0))
    world.say(1, { slot: { id: slot, params: {} } })
    world.replica.write({ kind: 'stop', slot })
    world.refuse(at(world.updates, 0), 'invalid')
    expect(world.replica.waiting).toBe(0)
    expect(world.replica.refused).toHaveLength(1)
    expect(world.texts).toEqual([])
  })

  it('of the birth takes all the rest along', () => {
    const world = new World()
    world.replica.write({
      kind: 'create',
      owner: 'olga',
      nonce: new Uint8Array(16),
      at: 1,
      title: null,
      model: null,
      policy: null
    })
    world.say(1)
    world.open()
    world.refuse(at(world.updates, 0), 'denied')
    expect(world.replica.refused.map(one => one.intent.kind)).toEqual(['create', 'entry'])
    expect(world.replica.waiting).toBe(0)
  })

  it('comes out the same if the page is gone before the rest is sent', async () => {
    const world = new World()
    world.open()
    world.say(1)
    world.say(2)
    world.refuse(at(world.updates, 0), 'too-large')
    await world.reload()
    world.open()
    world.take(at(world.updates, 0))
    expect(world.relayTexts).toEqual(['text 2'])
  })

  it('for now is followed by the same again, after the pause', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.say(2)
    const [first, second] = world.updates
    world.sent.length = 0
    world.refuse(first as Update, 'rate-limited', 400)
    expect(world.resumeIn).toBe(400)
    world.refuse(second as Update, 'gap')
    world.say(3)
    expect(world.updates).toEqual([])
    world.replica.resume()
    expect(world.updates.map(one => one.id)).toEqual([3, 4, 5])
    expect(world.updates[0]?.update).toEqual(first?.update)
    for (const update of [...world.updates]) world.take(update)
    expect(world.relayTexts).toEqual(['text 1', 'text 2', 'text 3'])
  })
})

describe('a gap', () => {
  it('is filled with what a relay lost, before what waits', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.take(at(world.updates, 0))
    world.say(2)
    const empty = encodeStateVector(new Map())
    world.sent.length = 0
    world.replica.receive({
      kind: 'nack',
      channel: 1,
      id: 2,
      code: 'gap',
      rule: '',
      reason: '',
      retryMs: null,
      stateVector: empty
    })
    expect(world.sent.map(one => one.kind)).toEqual(['restore', 'update'])
  })

  it('is mended by everything at once, and then by giving up for a while', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.say(2)
    world.refuse(at(world.updates, 0), 'gap')
    expect(world.updates).toHaveLength(4)
    world.refuse(at(world.updates, 2), 'gap')
    expect(world.updates).toHaveLength(5)
    const bundle = at(world.updates, 4)
    const other = new World()
    other.relay.apply(bundle.update)
    expect(other.relayTexts).toEqual(['text 1', 'text 2'])
    world.refuse(bundle, 'gap')
    expect(world.told.stuck).not.toBe('')
    expect(world.sent.at(-1)).toEqual({ kind: 'leave', channel: 1 })
    expect(world.replica.waiting).toBe(2)
  })

  it('after which everything is refused at once lets each be judged alone', () => {
    const world = new World()
    world.open()
    world.say(1)
    world.say(2)
    world.refuse(at(world.updates, 0), 'gap')
    world.refuse(at(world.updates, 2), 'gap')
    const bundle = at(world.updates, 4)
    world.sent.length = 0
    world.refuse(bundle, 'denied')
    expect(world.replica.refused).toEqual([])
    expect(world.updates).toHaveLength(2)
    world.refuse(at(world.updates, 0), 'denied')
    expect(world.replica.refused).toMatchObject([{ intent: { text: 'text 1' } }])
    world.take(at(world.updates, -1))
    expect(world.relayTexts).toEqual(['text 2'])
  })
})

it('gives a relay back what it lost, and then sends what is new', () => {
  const world = new World()
  world.open()
  world.say(1)
  world.take(at(world.updates, 0))
  world.replica.detach()
  world.say(2)
  const lost = new World(NOTHING)
  world.relay.destroy()
  Object.assign(world, { relay: lost.relay, lsn: 0 })
  world.sent.length = 0
  world.open('another log')
  const [restore, , update] = world.sent
  expect(world.sent.map(one => one.kind)).toEqual(['restore', 'presence', 'update'])
  for (const one of [restore, update]) lost.relay.apply((one as Update).update)
  expect(lost.relayTexts).toEqual(['text 1', 'text 2'])
})

it('keeps what waits when a relay does not take back what it lost', () => {
  const world = new World()
  world.open()
  world.say(1)
  world.take(at(world.updates, 0))
  world.replica.detach()
  world.say(2)
  const lost = new World()
  world.relay.destroy()
  Object.assign(world, { relay: lost.relay, lsn: 0 })
  world.sent.length = 0
  world.open('another log')
  const [restore, , update] = world.sent
  world.refuse(restore as Update, 'invalid')
  world.refuse(update as Update, 'gap')
  expect(world.replica).toMatchObject({ waiting: 1, problem: 'because', standing: 'open' })
  expect(world.replica.refused).toEqual([])
  world.say(3)
  expect(world.updates).toHaveLength(1)
})

describe('what was withdrawn', () => {
  it('goes from memory and disk once that is acknowledged, and not before', () => {
    const world = new World()
    world.open()
    const id = world.say(1)
    world.take(at(world.updates, 0))
    world.replica.write({ kind: 'redact', entry: id, at: 1 })
    expect(world.told.compacted).toBe(0)
    world.take(at(world.updates, 1))
    expect(world.told.compacted).toBe(1)
  })

  it('goes when somebody else withdraws it', () => {
    const world = new World()
    world.open()
    const id = world.say(1)
    world.take(at(world.updates, 0))
    world.lsn++
    const update = world.relay.compose(
      { kind: 'redact', entry: id, at: 1 },
      { principal: 'p', device: '' }
    )
    world.replica.receive({
      kind: 'change',
      channel: 1,
      lsn: world.lsn,
      update: update as Uint8Array
    })
    expect(world.told.compacted).toBe(1)
  })
})

describe('what a withdrawal met on its way', () => {
  it('goes from the disk when the node clears it away', () => {
    const world = new World()
    world.open()
    const id = world.say(1)
    world.take(at(world.updates, 0))
    const relay = new Y.Doc()
    Y.applyUpdate(relay, world.relay.diff())
    const change = (write: (entry: Y.Map<unknown>) => void): void => {
      const before = Y.encodeStateVector(relay)
      relay.transact(() => {
        write(relay.getMap('entries').get(id) as Y.Map<unknown>)
      })
      const update = Y.encodeStateAsUpdate(relay, before)
      world.replica.receive({ kind: 'change', channel: 1, lsn: ++world.lsn, update })
    }
    change(entry => entry.set('salt', new Uint8Array(16)))
    change(entry => {
      entry.set('redacted', { by: 'olga', at: 1 })
      entry.delete('content') // whoever withdraws it had not heard of the salt
    })
    expect(world.told.compacted).toBe(1)
    change(entry => entry.delete('salt'))
    expect(world.told.compacted).toBe(2)
  })
})

describe('two tabs', () => {
  it('show each other what they write, and each sends its own', () => {
    const [one, two] = [new World(NOTHING, 'one'), new World(NOTHING, 'two')]
    one.say(1)
    two.replica.hear(one.told.wrote)
    const id = two.say(2)
    one.replica.hear(two.told.wrote)
    expect(one.texts).toEqual(['text 1', 'text 2'])
    expect(two.texts).toEqual(one.texts)
    expect(two.replica.isUnsent(id)).toBe(true)
    two.open()
    expect(two.updates).toHaveLength(1)
  })

  it('take back what was refused in the other', () => {
    const [one, two] = [new World(NOTHING, 'one'), new World(NOTHING, 'two')]
    one.say(1)
    two.replica.hear(one.told.wrote)
    two.say(2)
    one.open()
    one.refuse(at(one.updates, 0), 'denied')
    for (const [rows, refused] of one.told.settled) two.replica.hearSettled(rows, refused)
    expect(two.texts).toEqual(['text 2'])
    two.open()
    two.take(at(two.updates, 0))
    expect(two.relayTexts).toEqual(['text 2'])
  })

  it('send what another left behind', () => {
    const [one, two] = [new World(NOTHING, 'one'), new World(NOTHING, 'two')]
    one.say(1)
    two.replica.hear(one.told.wrote)
    two.open()
    expect(two.updates).toEqual([])
    two.replica.adopt(one.told.wrote.map(row => ({ ...row, tab: 'two' })))
    two.take(at(two.updates, 0))
    expect(two.relayTexts).toEqual(['text 1'])
    expect(two.replica.waiting).toBe(0)
  })
})

describe('presence', () => {
  it('is said at once, follows the client id, and forgets who went', () => {
    const world = new World()
    world.open()
    expect(world.sent).toMatchObject([{ kind: 'presence', states: [{ json: '{"device":"d"}' }] }])
    const node = JSON.stringify({
      node: { model: 'm', doing: 'generating', warm: 3, tokens: 4, queue: 0 }
    })
    world.replica.receive({
      kind: 'presence',
      channel: 1,
      states: [
        { client: 5, clock: 2, json: node },
        { client: 6, clock: 1, json: '{"device":7}' },
        { client: 5, clock: 1, json: '{}' }
      ]
    })
    expect(world.replica.present()).toMatchObject([
      { self: true, device: 'd' },
      { client: 5, node: { model: 'm', doing: 'generating', warm: 3 } },
      { client: 6, device: '', node: null }
    ])
    world.replica.receive({
      kind: 'presence',
      channel: 1,
      states: [{ client: 6, clock: 2, json: null }]
    })
    expect(world.replica.present()).toHaveLength(2)
    world.replica.detach()
    expect(world.replica.present()).toEqual([])
  })
})

it('says why the relay closed the channel for now', () => {
  const world = new World()
  world.open()
  world.replica.receive({ kind: 'closed', channel: 1, code: 1013, reason: 'too many channels' })
  expect(world.replica).toMatchObject({ standing: 'detached', problem: 'too many channels' })
  world.sent.length = 0
  world.open()
  expect(world.replica).toMatchObject({ standing: 'open', problem: '' })
})

it('stays out once the relay closed the channel for good', () => {
  const world = new World()
  world.open()
  world.replica.receive({ kind: 'closed', channel: 1, code: 4403, reason: 'no' })
  expect(world.replica.standing).toBe('closed')
  expect(world.replica.closed).toEqual({ code: 4403, reason: 'no' })
  world.say(1)
  expect(world.updates).toEqual([])
  world.sent.length = 0
  world.open()
  expect(world.updates).toHaveLength(1)
})
