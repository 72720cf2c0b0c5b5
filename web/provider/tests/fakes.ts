/** Time that passes when a test says so, and randomness that repeats. */

import type { SocketLike } from '../src/connection.js'
import type { Environment } from '../src/environment.js'
import { decodeFromClient, encode, type FromClient, type FromRelay } from '../src/frames.js'

export class FakeTime implements Environment {
  private at = 1_000_000
  private timers: { at: number; run: () => void }[] = []

  /** @param state Another one draws other ids. */
  constructor(private state = 12_345) {}

  readonly now = (): number => this.at

  readonly random = (bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> => {
    // A linear congruential generator (Numerical Recipes); good enough to draw ids.
    for (let i = 0; i < bytes.length; i++) {
      this.state = (Math.imul(this.state, 1_664_525) + 1_013_904_223) >>> 0
      bytes[i] = this.state >>> 24
    }
    return bytes
  }

  readonly later = (ms: number, run: () => void): (() => void) => {
    const timer = { at: this.at + ms, run }
    this.timers.push(timer)
    return () => {
      this.timers = this.timers.filter(one => one !== timer)
    }
  }

  /** Lets time pass, timer by timer. */
  advance(ms: number): void {
    const end = this.at + ms
    for (;;) {
      const [next] = this.timers.filter(one => one.at <= end).sort((a, b) => a.at - b.at)
      if (next === undefined) break
      this.timers = this.timers.filter(one => one !== next)
      this.at = Math.max(this.at, next.at)
      next.run()
    }
    this.at = end
  }

  /** In how many ms the next timer is due. */
  get next(): number | null {
    const due = this.timers.map(one => one.at)
    return due.length === 0 ? null : Math.min(...due) - this.at
  }
}

/** A socket whose other end is the test. */
export class FakeSocket implements SocketLike {
  binaryType = 'blob'
  onopen: SocketLike['onopen'] = null
  onmessage: SocketLike['onmessage'] = null
  onclose: SocketLike['onclose'] = null
  onerror: SocketLike['onerror'] = null
  readonly sent: FromClient[] = []
  closed = false

  constructor(
    readonly url: string,
    readonly protocol: string
  ) {}

  send(data: Uint8Array): void {
    this.sent.push(decodeFromClient(data))
  }

  close(): void {
    this.closed = true
  }

  /** The line is up. */
  up(): void {
    this.onopen?.(undefined as never)
  }

  say(...frames: FromRelay[]): void {
    for (const frame of frames) this.sayBytes(encode(frame))
  }

  sayBytes(bytes: Uint8Array): void {
    this.onmessage?.({ data: bytes.slice().buffer as never })
  }

  end(code: number, reason = ''): void {
    this.onclose?.({ code, reason })
  }
}
