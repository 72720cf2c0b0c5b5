/** A client against a relay that the test plays, frame by frame. */

import { afterEach, describe, expect, it } from 'vitest'
import type { FromClient, FromRelay, Plain } from '../src/frames.js'
import { type Client, type ClientOptions, MemoryStore, openClient } from '../src/index.js'
import { browserTabs, type Message } from '../src/tabs.js'
import { FakeSocket, FakeTime } from './fakes.js'
import { until } from './relay.js'

const [A, B, C] = ['A', 'B', 'C'].map(letter => letter.repeat(22)) as [string, string, string]
const KEY = new Uint8Array(32).fill(7)

const facts = (title: string, changedAt: number, more: Plain = {}): Plain => ({
  title,
  role: 'owner',
  owner: 'olga',
  created_at: 1,
  changed_at: changedAt,
  archived: false,
  ...more
})

class World {
  readonly time = new FakeTime()
  readonly store = new MemoryStore()
  readonly sockets: FakeSocket[] = []
  client!: Client

  async start(more: Partial<ClientOptions> = {}): Promise<this> {
    this.client = await openClient(
      {
        url: 'http://relay/',
        token: 'opaque',
        device: 'phone',
        store: this.store,
        socket: (url, protocol) => {
          const socket = new FakeSocket(url, protocol)
          this.sockets.push(socket)
          return socket
        },
        ...more
      },
      this.time
    )
    worlds.push(this)
    await turn()
    return this
  }

  get socket(): FakeSocket {
    const socket = this.sockets.at(-1)
    if (socket === undefined) throw new Error('nobody connected')
    return socket
  }

  greet(principal = 'olga', relay = KEY): void {
    this.socket.up()
    this.socket.say({ kind: 'welcome', version: 1, principal, relay, expiresAt: null, log: 'log' })
  }

  /** The last frame of a kind. */
  last<K extends FromClient['kind']>(kind: K): FromClient & { kind: K } {
    const frame = this.socket.sent.findLast(one => one.kind === kind)
    if (frame === undefined) throw new Error(`there was no ${kind}`)
    return frame as FromClient & { kind: K }
  }

  opened(channel: number, grant = 'owner'): void {
    this.socket.say({
      kind: 'opened',
      channel,
      log: 'log',
      lsn: 0,
      update: Uint8Array.of(0, 0),
      stateVector: Uint8Array.of(0),
      grant,
      behind: false
    })
  }

  /** The relay says this later. */
  list(whole: boolean, end: boolean, ...conversations: [string, Plain | null][]): void {
    this.socket.say({ kind: 'listed', whole, end, conversations })
  }
}

const worlds: World[] = []
const turn = (): Promise<void> => new Promise(resolve => setTimeout(resolve, 0))

afterEach(async () => {
  for (const { client } of worlds.splice(0)) await client.close()
})

describe('the list', () => {
  it('is whole once its last frame came, and follows what changes', async () => {
    const world = await new World().start()
    world.greet()
    expect(world.last('watch')).toEqual({ kind: 'watch', on: true })
    const heard: string[][] = []
    world.client.on('list', list => heard.push(list.map(one => one.title)))
    world.list(true, false, [A, facts('first', 1)])
    expect(heard).toEqual([])
    world.list(true, true, [B, facts('second', 2, { role: 'reader', archived: true })])
    world.list(false, true, [A, facts('changed', 3)])
    world.list(false, true, [B, null], [C, { nonsense: true }])
    expect(heard).toEqual([
      ['second', 'first'],
      ['changed', 'second'],
      ['changed', '']
    ])
    expect(world.client.list[1]).toEqual({
      id: C,
      title: '',
      role: null,
      owner: '',
      createdAt: 0,
      changedAt: 0,
      archived: false
    })
    await world.client.close()
    const later = new World()
    Object.assign(later, { store: world.store })
    await later.start({ offline: true })
    expect(later.client.list.map(one => one.title)).toEqual(['changed', ''])
    expect(later.client.status.principal).toBe('olga')
  })

  it('lets go of what a new whole list does not have, but not of what was made here', async () => {
    const world = await new World().start({ principal: 'olga' })
    const made = await world.client.create({ title: 'mine' })
    world.greet()
    world.list(true, true, [A, facts('a', 1)])
    expect(world.client.list.map(one => [one.title, one.role])).toEqual([
      ['mine', null],
      ['a', 'owner']
    ])
    world.list(true, true, [made.id, facts('mine', 5)])
    expect(world.client.list.map(one => [one.title, one.role])).toEqual([['mine', 'owner']])
    await made.rename('yours')
    await turn()
    expect(world.client.list.map(one => one.title)).toEqual(['yours'])
  })
})

describe('who we are', () => {
  it('comes from the relay, and lets what waited for it go on', async () => {
    const world = await new World().start()
    const creating = world.client.create()
    world.greet()
    expect((await creating).meta.owner).toBe('olga')
    expect(world.client.status).toMatchObject({ state: 'online', principal: 'olga' })
  })

  it('is kept at once: a page that ends right after the greeting can begin one offline', async () => {
    const world = await new World().start()
    world.greet()
    await turn() // no time passes, and nothing is closed
    const later = new World()
    Object.assign(later, { store: world.store })
    await later.start({ offline: true })
    expect((await later.client.create()).meta.owner).toBe('olga')
  })

  it('does not change within a profile', async () => {
    const world = await new World().start({ principal: 'olga' })
    world.greet('ann')
    expect(world.client.status).toMatchObject({ state: 'refused', principal: 'olga' })
    expect(world.client.status.reason).toContain('ann')
  })

  it('is not found out with a token that is refused', async () => {
    const world = await new World().start()
    const creating = world.client.create()
    world.socket.up()
    world.socket.end(4401, 'unknown token')
    await expect(creating).rejects.toMatchObject({ code: 'refused', message: 'unknown token' })
  })
})

describe('requests', () => {
  it('are answered by their number', async () => {
    const world = await new World().start()
    world.greet()
    world.list(true, true, [A, facts('a', 1)])
    const archiving = world.client.archive(A, true)
    const revoking = world.client.revoke('jti')
    const [first, second] = world.socket.sent.filter(one => one.kind === 'request')
    expect([first, second]).toMatchObject([
      { name: 'archive', arguments: { conversation: A, archived: true } },
      { name: 'revoke', arguments: { id: 'jti' } }
    ])
    const answer = (one: FromClient | undefined, values: Plain | null, code = ''): FromRelay => ({
      kind: 'answer',
      id: (one as { id: number }).id,
      values,
      code,
      reason: code && 'because'
    })
    world.socket.say(answer(second, null, 'denied'), answer(first, {}))
    await archiving
    expect(world.client.list).toMatchObject([{ id: A, archived: true }])
    await expect(revoking).rejects.toMatchObject({
      code: 'refused',
      rule: 'denied',
      message: 'because'
    })
  })

  it('fail when the line does', async () => {
    const world = await new World().start()
    world.greet()
    const archiving = world.client.archive(A, true)
    world.socket.end(1012)
    await expect(archiving).rejects.toMatchObject({ code: 'offline' })
  })

  it('for an invitation also write the right', async () => {
    const world = await new World().start()
    world.greet()
    const made = await world.client.create()
    world.opened(world.last('open').channel)
    const inviting = world.client.invite(made.id, { role: 'reader', name: 'Ann' })
    const { id, arguments: asked } = world.last('request')
    expect(asked).toEqual({ conversation: made.id, role: 'reader', expires_at: null, name: 'Ann' })
    world.socket.say({
      kind: 'answer',
      id,
      values: { principal: 'guest:x', token: 't', id: 'jti' },
      code: '',
      reason: ''
    })
    await turn()
    expect(made.access.get('guest:x')).toBe('reader')
    const { channel, id: sent } = world.last('update')
    world.socket.say({ kind: 'ack', channel, id: sent, lsn: 9 })
    expect(await inviting).toEqual({
      conversation: made.id,
      principal: 'guest:x',
      token: 't',
      id: 'jti'
    })
  })
})

describe('channels', () => {
  it('are opened again after every new connection', async () => {
    const world = await new World().start()
    world.greet()
    const [one, two] = [await world.client.open(A), await world.client.open(B)]
    const channels = world.socket.sent.flatMap(frame =>
      frame.kind === 'open' ? [frame.channel] : []
    )
    expect(new Set(channels).size).toBe(2)
    for (const channel of channels) world.opened(channel)
    expect([one.status.state, two.status.state]).toEqual(['synced', 'synced'])
    world.socket.end(1006)
    expect(one.status.state).toBe('offline')
    world.time.advance(1_000)
    await turn()
    world.greet()
    expect(world.socket.sent.filter(frame => frame.kind === 'open')).toHaveLength(2)
    await one.close()
    expect(world.last('leave').channel).toBe(channels[0])
  })

  it('that a relay closed for now are opened again, those it closed for good are not', async () => {
    const world = await new World().start()
    world.greet()
    const [one, two] = [await world.client.open(A), await world.client.open(B)]
    const [first, second] = world.socket.sent.filter(frame => frame.kind === 'open')
    world.socket.say(
      {
        kind: 'closed',
        channel: (first as { channel: number }).channel,
        code: 1013,
        reason: 'later'
      },
      { kind: 'closed', channel: (second as { channel: number }).channel, code: 4403, reason: 'no' }
    )
    await expect(two.synced()).rejects.toMatchObject({ code: 'refused' })
    world.time.advance(10_000)
    const asked = (): string[] =>
      world.socket.sent.flatMap(frame => (frame.kind === 'open' ? [frame.conversation] : []))
    expect(asked()).toEqual([A, B, A])
    expect([one.status.state, two.status.state]).toEqual(['syncing', 'refused'])
    // Somebody lets us in again.
    world.list(false, true, [B, facts('b', 1, { role: 'reader' })])
    expect(asked()).toEqual([A, B, A, B])
  })

  it('hear from us again before the relay forgets that we are here', async () => {
    const world = await new World().start()
    world.greet()
    await world.client.open(A)
    world.opened(world.last('open').channel)
    const clocks = (): number[] =>
      world.socket.sent.flatMap(frame =>
        frame.kind === 'presence' ? frame.states.map(state => state.clock) : []
      )
    expect(clocks()).toEqual([1])
    world.time.advance(31_000)
    expect(clocks()).toEqual([1, 2, 3])
  })

  it('carry hints, unless they are turned off', async () => {
    const world = await new World().start()
    world.greet()
    const one = await world.client.open(A)
    world.opened(world.last('open').channel)
    one.typing('hel')
    expect(world.last('draft')).toMatchObject({ after: '', keep: 0, text: 'hel' })
    one.hints = false
    one.typing('hello')
    world.time.advance(1_000)
    expect(world.socket.sent.filter(frame => frame.kind === 'draft')).toHaveLength(1)
  })
})

it('tells other tabs, by BroadcastChannel', async () => {
  const [one, two] = [browserTabs('shared', 'one'), browserTabs('shared', 'two')]
  const heard: Message[] = []
  let look = (): void => undefined
  two.listen(message => {
    heard.push(message)
    look()
  })
  one.post({ kind: 'settled', conversation: A, rows: ['r'], refused: false })
  one.close()
  await until(
    () => heard.length === 2,
    listener => {
      look = listener
      return () => undefined
    }
  )
  expect(heard).toEqual([
    { kind: 'settled', conversation: A, rows: ['r'], refused: false },
    { kind: 'gone', tab: 'one' }
  ])
  expect(await two.isGone('two')).toBe(false)
  two.close()
})
