/**
 * One connection to a relay, and coming back after it was lost.
 *
 * This module owns the greeting, the token, pinning the relay's key, noticing a dead line, and when
 * to try again. It must not know conversations: frames behind the greeting go to its owner. Sockets,
 * time and randomness are arguments, so that tests need neither network nor patience.
 *
 * Close codes from 4400 to 4499 mean: do not come back with the same request. After every other end
 * it comes back, with pauses that double from 0.25 s to 30 s, half of them random; they begin anew
 * only after a completed sync, so that a relay that falls over while greeting is not hammered.
 */

import type { Environment } from './environment.js'
import { ProviderError } from './errors.js'
import {
  decodeFromRelay,
  encode,
  type FromClient,
  type FromRelay,
  SUBPROTOCOL,
  VERSION,
  type Welcome
} from './frames.js'

/** What of a `WebSocket` is used. */
export interface SocketLike {
  binaryType: string
  onopen: ((event: never) => void) | null
  onmessage: ((event: { data: never }) => void) | null
  onclose: ((event: { code: number; reason: string }) => void) | null
  onerror: ((event: never) => void) | null
  send(data: Uint8Array<ArrayBuffer>): void
  close(code?: number, reason?: string): void
}

/** Opens a websocket. */
export type SocketFactory = (url: string, protocol: string) => SocketLike

/** The first pause after a lost connection. */
export const PAUSE_MS_MIN = 250
/** The longest. */
export const PAUSE_MS_MAX = 30_000
/** So long a relay may be silent when something is to be answered; then the line is dead. */
export const SILENCE_MS_MAX = 20_000
/** After waking up (a laptop that slept) the line is tried, and dead this much earlier. */
export const PROBE_MS_MAX = 5_000
/** A line that brought something this recently is not tried. */
const FRESH_MS = 5_000
/** So long before its end a token is renewed. */
const RENEW_BEFORE_MS = 60_000
/** Timers of browsers count 31 bits of milliseconds; this stays below. */
const TIMER_MS_MAX = 24 * 3600 * 1000

const ANSWERED: ReadonlySet<string> = new Set([
  'hello',
  'open',
  'update',
  'restore',
  'pull',
  'request'
])

/** How a connection stands. */
export interface ConnectionStatus {
  readonly state: 'offline' | 'connecting' | 'online' | 'refused' | 'closed'
  readonly retryAt: number | null
  readonly expiresAt: number | null
  readonly code: number | null
  readonly reason: string
}

/** Whoever uses the connection. */
export interface Owner {
  /** Who the relay says we are; a text says why that will not do. */
  welcomed(welcome: Welcome): string | null
  /** Every frame but greetings. */
  received(frame: FromRelay): void
  /** An online connection ended. */
  lost(): void
  status(status: ConnectionStatus): void
}

/** A connection that comes back. */
export class Connection {
  private now: ConnectionStatus = {
    state: 'offline',
    retryAt: null,
    expiresAt: null,
    code: null,
    reason: ''
  }
  private socket: SocketLike | null = null
  private attempts = 0
  private cancelRetry: (() => void) | null = null
  private cancelSilence: (() => void) | null = null
  private cancelRenewal: (() => void) | null = null
  private heardAt = 0
  private offered: string | null = null
  /** Frames that wait for a Welcome; `null` while none is due. */
  private held: FromClient[] | null = null
  /** A token to greet with after that. */
  private wanted: string | null = null

  /**
   * @param address `ws(s)://…`, see {@link relayAddress}.
   * @param token Asked before each greeting.
   */
  constructor(
    private readonly address: string,
    private token: () => string | Promise<string>,
    private readonly device: string,
    private readonly environment: Environment,
    private readonly open: SocketFactory,
    private readonly owner: Owner
  ) {}

  /** How it stands. */
  get status(): ConnectionStatus {
    return this.now
  }

  // -- what its owner does ---------------------------------------------------------------------

  /** Connect now, also after a refusal; does nothing while there is a connection. */
  connect(): void {
    if (this.socket !== null || this.now.state === 'connecting' || this.now.state === 'closed')
      return
    this.clearTimers()
    this.set({ state: 'connecting', retryAt: null })
    void this.dial()
  }

  /** Leave, until {@link connect}. */
  disconnect(): void {
    if (this.now.state === 'closed') return
    this.drop({ state: 'offline', retryAt: null, reason: 'disconnected' })
  }

  /** Leave for good. */
  close(): void {
    this.drop({ state: 'closed', retryAt: null, reason: '' })
  }

  /** Send a frame; only while online. */
  send(frame: FromClient): void {
    if (this.now.state !== 'online') throw new ProviderError('offline', 'there is no connection')
    if (this.held === null) this.write(frame)
    else this.held.push(frame)
  }

  /** A sync was completed: the next pause is a short one. */
  synced(): void {
    this.attempts = 0
  }

  /** Go on with another token. */
  setToken(token: () => string | Promise<string>): void {
    this.token = token
    if (this.now.state === 'online') void this.renew(true)
    else this.connect()
  }

  /** The network or the page came back: do not wait for the pause, and try an old line. */
  wake(): void {
    if (this.now.state === 'offline' && this.now.retryAt !== null) return this.connect()
    if (this.now.state !== 'online') return
    if (this.environment.now() - this.heardAt < FRESH_MS || this.offered === null) return
    if (this.held === null) this.hello(this.offered)
    this.watchSilence(PROBE_MS_MAX)
  }

  /** Give this connection up, and come back after a pause. */
  fail(reason: string): void {
    this.retryLater(null, reason)
  }

  // -- the line --------------------------------------------------------------------------------

  private async dial(): Promise<void> {
    let token: string
    try {
      token = await this.token()
    } catch (error) {
      if (this.now.state === 'connecting') {
        this.retryLater(null, `no token: ${error instanceof Error ? error.message : String(error)}`)
      }
      return
    }
    if (this.now.state !== 'connecting' || this.socket !== null) return
    const socket = this.open(this.address, SUBPROTOCOL)
    this.socket = socket
    socket.binaryType = 'arraybuffer'
    socket.onopen = () => {
      if (this.socket === socket) this.hello(token)
    }
    socket.onmessage = ({ data }: { data: unknown }) => {
      if (this.socket === socket) this.receive(data)
    }
    socket.onclose = ({ code, reason }) => {
      if (this.socket === socket) this.ended(code, reason)
    }
    socket.onerror = () => undefined // a close follows, and says more
    this.watchSilence(SILENCE_MS_MAX)
  }

  private hello(token: string): void {
    this.offered = token
    this.held = []
    this.write({ kind: 'hello', version: VERSION, token, device: this.device, node: null })
  }

  private write(frame: FromClient): void {
    this.socket?.send(encode(frame) as Uint8Array<ArrayBuffer>)
    if (ANSWERED.has(frame.kind) && this.cancelSilence === null) this.watchSilence(SILENCE_MS_MAX)
  }

  private watchSilence(ms: number): void {
    this.cancelSilence?.()
    this.cancelSilence = this.environment.later(ms, () => {
      this.cancelSilence = null
      this.fail('the relay does not answer')
    })
  }

  private receive(data: unknown): void {
    this.heardAt = this.environment.now()
    this.cancelSilence?.()
    this.cancelSilence = null
    let frame: FromRelay
    try {
      if (!(data instanceof ArrayBuffer)) throw new ProviderError('malformed', 'frames are binary')
      frame = decodeFromRelay(new Uint8Array(data))
    } catch (error) {
      if (!(error instanceof ProviderError)) throw error
      return this.fail(`the relay sent what is no frame: ${error.message}`)
    }
    if (frame.kind === 'welcome') return this.welcomed(frame)
    if (this.now.state !== 'online') return this.fail('the relay did not greet')
    this.owner.received(frame)
  }

  private welcomed(welcome: Welcome): void {
    const problem =
      welcome.version === VERSION
        ? this.owner.welcomed(welcome)
        : `the relay speaks version ${welcome.version}`
    if (problem !== null) {
      return this.drop({ state: 'refused', retryAt: null, code: null, reason: problem })
    }
    const { expiresAt } = welcome
    if (expiresAt !== null) this.renewBefore(expiresAt)
    const held = this.held ?? []
    this.held = null
    for (const frame of held) this.write(frame)
    const { wanted } = this
    this.wanted = null
    this.set({ state: 'online', retryAt: null, expiresAt, code: null, reason: '' })
    if (wanted !== null) this.hello(wanted)
  }

  private renewBefore(expiresAt: number): void {
    this.cancelRenewal?.()
    const left = expiresAt - this.environment.now()
    // A token that lives shorter than twice the margin is renewed at half its life.
    const wait = Math.max(left - RENEW_BEFORE_MS, left / 2)
    this.cancelRenewal = this.environment.later(Math.max(0, Math.min(wait, TIMER_MS_MAX)), () => {
      this.cancelRenewal = null
      if (wait > TIMER_MS_MAX) this.renewBefore(expiresAt)
      else void this.renew(false)
    })
  }

  /** Greet again with a new token, if there is one. */
  private async renew(always: boolean): Promise<void> {
    let token: string
    try {
      token = await this.token()
    } catch {
      return // the old one holds for a while; at its end the relay says so
    }
    if (this.now.state === 'online' && (always || token !== this.offered)) {
      if (this.held === null) this.hello(token)
      else this.wanted = token
    }
  }

  private ended(code: number, reason: string): void {
    if (code >= 4400 && code <= 4499) {
      return this.drop({ state: 'refused', retryAt: null, code, reason })
    }
    this.retryLater(code, reason)
  }

  private retryLater(code: number | null, reason: string): void {
    const longest = Math.min(PAUSE_MS_MAX, PAUSE_MS_MIN * 2 ** this.attempts)
    this.attempts++
    const [drawn] = new Uint32Array(this.environment.random(new Uint8Array(4)).buffer)
    const pause = longest / 2 + (longest / 2) * ((drawn ?? 0) / 2 ** 32)
    this.drop({ state: 'offline', retryAt: this.environment.now() + pause, code, reason })
    this.cancelRetry = this.environment.later(pause, () => {
      this.cancelRetry = null
      this.connect()
    })
  }

  private drop(status: Partial<ConnectionStatus>): void {
    const { socket } = this
    const wasOnline = this.now.state === 'online'
    this.socket = null
    this.held = this.wanted = null
    this.clearTimers()
    if (socket !== null) {
      socket.onopen = socket.onmessage = socket.onclose = null
      socket.close(1000)
    }
    this.set(status)
    if (wasOnline) this.owner.lost()
  }

  private clearTimers(): void {
    for (const cancel of [this.cancelRetry, this.cancelSilence, this.cancelRenewal]) cancel?.()
    this.cancelRetry = this.cancelSilence = this.cancelRenewal = null
  }

  private set(status: Partial<ConnectionStatus>): void {
    this.now = { ...this.now, ...status }
    this.owner.status(this.now)
  }
}

/**
 * The websocket address of a relay.
 *
 * @param url `ws(s)://` or `http(s)://`. What follows the path is dropped: a token there would end up
 *   in logs.
 * @throws ProviderError `misuse`.
 */
export const relayAddress = (url: string): string => {
  let parsed: URL
  try {
    parsed = new URL(url)
  } catch {
    throw new ProviderError('misuse', `${url} is no address`)
  }
  const secure = parsed.protocol === 'https:' || parsed.protocol === 'wss:'
  if (!secure && parsed.protocol !== 'http:' && parsed.protocol !== 'ws:') {
    throw new ProviderError('misuse', `${url} is no address of a relay`)
  }
  return `${secure ? 'wss' : 'ws'}://${parsed.host}/`
}

/** Sockets of the browser. */
export const browserSocket: SocketFactory = (url, protocol) =>
  new WebSocket(url, protocol) as unknown as SocketLike

/** The principal that a signed token names; `null` for one that only the relay can read. */
export const principalOf = (token: string): string | null => {
  const [, claims] = token.split('.')
  if (claims === undefined) return null
  try {
    const bytes = Uint8Array.from(
      atob(claims.replaceAll('-', '+').replaceAll('_', '/')),
      character => character.charCodeAt(0)
    )
    const { sub } = JSON.parse(new TextDecoder().decode(bytes)) as { sub?: unknown }
    return typeof sub === 'string' && sub !== '' ? sub : null
  } catch {
    return null // it is no signed token of ours: the relay will say who it stands for
  }
}
