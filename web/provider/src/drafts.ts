/**
 * Hints of what is being typed, so that the node can read ahead.
 *
 * This module owns what is sent of a draft and how often. It must not know connections or documents:
 * time and sending are arguments. A hint is a delta: how many UTF-8 bytes of the last one stay, and
 * what follows them. Hints reach the node alone and are never stored.
 */

import type { Environment } from './environment.js'
import { DRAFT_BYTES_MAX } from './frames.js'
import { utf8 } from './schema.js'

/** Between two hints; a relay passes on ten a second of each connection. */
export const HINT_INTERVAL_MS = 100

/** What a hint says; `after: null` drops the draft. */
export interface Hint {
  readonly after: string | null
  readonly keep: number
  readonly text: string
}

/** The draft of one conversation. */
export class Draft {
  private wanted: { after: string; text: string } | null = null
  private sent: { after: string; text: string } | null = null
  private lastAt = Number.NEGATIVE_INFINITY
  private cancel: (() => void) | null = null

  /**
   * @param send Sends a hint; `false` if there is no connection now.
   */
  constructor(
    private readonly environment: Pick<Environment, 'now' | 'later'>,
    private readonly send: (hint: Hint) => boolean
  ) {}

  /** This is in the input field now, to be written after that entry; `''` drops the draft. */
  typing(text: string, after: string): void {
    // Nobody waits for a draft that long: it is read once it is sent.
    const long = utf8(text).length > DRAFT_BYTES_MAX
    this.wanted = text === '' || long ? null : { after, text: wellFormed(text) }
    this.schedule()
  }

  /** It was sent as an entry: the node takes its draft over, and nothing is dropped. */
  submitted(): void {
    this.wanted = null
    this.sent = null
    this.cancel?.()
    this.cancel = null
  }

  /** The connection is another: the node knows nothing of this draft. */
  reconnected(): void {
    this.sent = null
    this.schedule()
  }

  private schedule(): void {
    if (this.cancel !== null) return
    const wait = this.lastAt + HINT_INTERVAL_MS - this.environment.now()
    if (wait <= 0) return this.flush()
    this.cancel = this.environment.later(wait, () => {
      this.cancel = null
      this.flush()
    })
  }

  private flush(): void {
    const { wanted, sent } = this
    if (wanted?.text === sent?.text && wanted?.after === sent?.after) return
    const before = sent !== null && sent.after === wanted?.after ? sent.text : ''
    const hint =
      wanted === null
        ? { after: null, keep: 0, text: '' }
        : { after: wanted.after, ...delta(before, wanted.text) }
    if (!this.send(hint)) return
    this.sent = wanted
    this.lastAt = this.environment.now()
  }
}

/** Text without lone surrogates, which no UTF-8 can carry. */
export const wellFormed = (text: string): string =>
  new TextDecoder('utf-8', { ignoreBOM: true }).decode(utf8(text))

/** How many UTF-8 bytes of `before` begin `now`, whole characters alone, and what follows them. */
export const delta = (before: string, now: string): { keep: number; text: string } => {
  let same = 0
  while (same < before.length && before[same] === now[same]) same++
  const splits = (text: string): boolean =>
    same > 0 && same < text.length && isHighSurrogate(text.charCodeAt(same - 1))
  if (splits(before) || splits(now)) same--
  return { keep: utf8(now.slice(0, same)).length, text: now.slice(same) }
}

const isHighSurrogate = (unit: number): boolean => unit >= 0xd800 && unit <= 0xdbff
