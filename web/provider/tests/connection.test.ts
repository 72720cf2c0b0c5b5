import { describe, expect, it } from 'vitest'
import {
  Connection,
  type ConnectionStatus,
  PAUSE_MS_MAX,
  PAUSE_MS_MIN,
  PROBE_MS_MAX,
  principalOf,
  relayAddress,
  SILENCE_MS_MAX
} from '../src/connection.js'
import type { FromRelay, Welcome } from '../src/frames.js'
import { FakeSocket, FakeTime } from './fakes.js'

const welcome = (more: Partial<Welcome> = {}): Welcome => ({
  kind: 'welcome',
  version: 1,
  principal: 'olga',
  relay: new Uint8Array(32),
  expiresAt: null,
  log: 'log',
  ...more
})

class World {
  readonly time = new FakeTime()
  readonly sockets: FakeSocket[] = []
  readonly received: FromRelay[] = []
  readonly statuses: ConnectionStatus[] = []
  lost = 0
  objection: string | null = null
  token: string | Promise<string> = 'token'
  readonly connection = new Connection(
    'ws://relay/',
    () => this.token,
    'phone',
    this.time,
    (url, protocol) => {
      const socket = new FakeSocket(url, protocol)
      this.sockets.push(socket)
      return socket
    },
    {
      welcomed: () => this.objection,
      received: frame => this.received.push(frame),
      lost: () => {
        this.lost++
      },
      status: status => this.statuses.push(status)
    }
  )

  get socket(): FakeSocket {
    const socket = this.sockets.at(-1)
    if (socket === undefined) throw new Error('nobody connected')
    return socket
  }

  get state(): string {
    return this.connection.status.state
  }

  /** Lets what waits for a token go on. */
  async turn(): Promise<void> {
    for (let i = 0; i < 5; i++) await Promise.resolve()
  }

  async online(more: Partial<Welcome> = {}): Promise<void> {
    this.connection.connect()
    await this.turn()
    this.socket.up()
    this.socket.say(welcome(more))
  }

  /** Lets the next timer fire; answers after how long. */
  async pause(): Promise<number> {
    const ms = this.time.next ?? 0
    this.time.advance(ms)
    await this.turn()
    return ms
  }
}

describe('a connection', () => {
  it('greets with the token in the frame, never in the address', async () => {
    const world = new World()
    await world.online()
    expect(world.socket).toMatchObject({
      url: 'ws://relay/',
      protocol: 'crdt-llm.v1',
      binaryType: 'arraybuffer',
      sent: [{ kind: 'hello', version: 1, token: 'token', device: 'phone', node: null }]
    })
    expect(world.state).toBe('online')
    world.socket.say({ kind: 'renewed', ttlMs: 1 })
    expect(world.received).toEqual([{ kind: 'renewed', ttlMs: 1 }])
  })

  it('comes back with pauses that double, and starts anew only after a completed sync', async () => {
    const world = new World()
    world.connection.connect()
    await world.turn()
    for (let longest = PAUSE_MS_MIN; longest < 4 * PAUSE_MS_MAX; longest *= 2) {
      world.socket.end(1006)
      expect(world.state).toBe('offline')
      const pause = await world.pause()
      expect(pause).toBeGreaterThanOrEqual(Math.min(longest, PAUSE_MS_MAX) / 2)
      expect(pause).toBeLessThanOrEqual(Math.min(longest, PAUSE_MS_MAX))
    }
    world.socket.up()
    world.socket.say(welcome())
    world.socket.end(1012)
    expect(await world.pause()).toBeGreaterThan(PAUSE_MS_MIN) // greeted, but not synced
    world.socket.up()
    world.socket.say(welcome())
    world.connection.synced()
    world.socket.end(1012)
    expect(await world.pause()).toBeLessThanOrEqual(PAUSE_MS_MIN)
    expect(world.lost).toBe(2)
  })

  it.each([4400, 4401, 4403, 4499])(
    'does not come back after %d, until it is told to',
    async code => {
      const world = new World()
      await world.online()
      world.socket.end(code, 'no')
      expect(world.connection.status).toMatchObject({
        state: 'refused',
        code,
        reason: 'no',
        retryAt: null
      })
      world.time.advance(24 * 3600 * 1000)
      world.connection.wake()
      await world.turn()
      expect(world.sockets).toHaveLength(1)
      world.connection.setToken(() => 'another')
      await world.turn()
      world.socket.up()
      expect(world.socket.sent).toMatchObject([{ token: 'another' }])
    }
  )

  it('is refused where its owner objects, or the version is another', async () => {
    const world = new World()
    world.objection = 'not that relay'
    await world.online()
    expect(world.connection.status).toMatchObject({ state: 'refused', reason: 'not that relay' })
    expect(world.socket.closed).toBe(true)
    const other = new World()
    await other.online({ version: 2 })
    expect(other.connection.status).toMatchObject({
      state: 'refused',
      reason: expect.stringContaining('2')
    })
  })

  it('gives a relay up that sends what is no frame, or does not greet', async () => {
    for (const bytes of [Uint8Array.of(0xc1), Uint8Array.of(0x92, 43, 5)]) {
      const world = new World()
      world.connection.connect()
      await world.turn()
      world.socket.up()
      world.socket.sayBytes(bytes)
      expect(world.state).toBe('offline')
      expect(world.received).toEqual([])
    }
  })

  it('notices a dead line when something is to be answered', async () => {
    const world = new World()
    await world.online()
    world.time.advance(10 * SILENCE_MS_MAX)
    expect(world.state).toBe('online') // nothing was asked
    world.connection.send({ kind: 'update', channel: 1, id: 1, update: new Uint8Array() })
    world.time.advance(SILENCE_MS_MAX - 1)
    expect(world.state).toBe('online')
    world.time.advance(1)
    expect(world.state).toBe('offline')
    expect(world.lost).toBe(1)
  })

  it('does not wait when the network comes back, and tries a line that was silent', async () => {
    const world = new World()
    await world.online()
    world.socket.end(1006)
    world.connection.wake()
    await world.turn()
    expect(world.sockets).toHaveLength(2)
    world.socket.up()
    world.socket.say(welcome())
    world.connection.wake()
    expect(world.socket.sent).toHaveLength(1) // it was just heard of
    world.time.advance(60_000)
    world.connection.wake()
    world.connection.wake()
    world.connection.send({ kind: 'watch', on: true })
    expect(world.socket.sent.map(one => one.kind)).toEqual(['hello', 'hello']) // it waits for Welcome
    world.socket.say(welcome())
    expect(world.socket.sent.at(-1)).toEqual({ kind: 'watch', on: true })
    world.time.advance(60_000)
    world.connection.wake()
    world.time.advance(PROBE_MS_MAX)
    expect(world.state).toBe('offline')
  })

  it('renews a token before it ends, and says nothing of one that is the same', async () => {
    const world = new World()
    await world.online({ expiresAt: world.time.now() + 600_000 })
    world.token = 'second'
    await world.pause()
    expect(world.socket.sent).toMatchObject([{ token: 'token' }, { token: 'second' }])
    world.socket.say(welcome({ expiresAt: world.time.now() + 600_000 }))
    await world.pause()
    expect(world.socket.sent).toHaveLength(2)
    expect(world.state).toBe('online')
    expect(world.lost).toBe(0)
  })

  it('tries again when there is no token now', async () => {
    const world = new World()
    world.token = Promise.reject(new Error('signed out'))
    world.connection.connect()
    await world.turn()
    expect(world.connection.status).toMatchObject({
      state: 'offline',
      reason: 'no token: signed out'
    })
    world.token = 'token'
    await world.pause()
    expect(world.sockets).toHaveLength(1)
  })

  it('hears nothing more of a line that it left', async () => {
    const world = new World()
    await world.online()
    const { socket } = world
    world.connection.disconnect()
    socket.say(welcome())
    socket.end(4401)
    expect(world.connection.status).toMatchObject({ state: 'offline', retryAt: null })
    expect(world.time.next).toBeNull()
    world.connection.close()
    world.connection.connect()
    await world.turn()
    expect(world.sockets).toHaveLength(1)
    expect(() => world.connection.send({ kind: 'renew' })).toThrow(/no connection/)
  })
})

describe('addresses and tokens', () => {
  it.each([
    ['http://host:1/page?token=x#y', 'ws://host:1/'],
    ['https://host', 'wss://host/'],
    ['wss://host/', 'wss://host/']
  ])('%s is %s', (url, address) => expect(relayAddress(url)).toBe(address))

  it.each(['', 'host', 'ftp://host'])('%j is none', url => {
    expect(() => relayAddress(url)).toThrowError(expect.objectContaining({ code: 'misuse' }))
  })

  it('reads who a signed token is of', () => {
    const claims = Buffer.from(JSON.stringify({ sub: 'Zoë' })).toString('base64url')
    expect(principalOf(`h.${claims}.s`)).toBe('Zoë')
    for (const none of ['opaque', 'h.!!.s', 'h.bnVsbA.s', `h.${btoa('{}')}.s`]) {
      expect(principalOf(none)).toBeNull()
    }
  })
})
