/**
 * The native dialect `crdt-llm.v1`: one frame of bytes, one message, and back.
 *
 * This module owns the grammar of frames and their limits, as a client needs them. It must not know
 * sockets or documents: updates are opaque here, and whether a message is allowed is for others.
 *
 * A frame is one binary websocket message: a MessagePack list, a number for its kind first, then its
 * fields in the order of the tables below. A frame with a kind, a number of fields or a value that
 * the table does not have is malformed. There are no optional fields: what is absent is nil.
 *
 * `protocol/vectors/frames.json` holds one frame of each kind, read by every implementation.
 */

import { malformed, misuse, ProviderError } from './errors.js'
import { Fraction, pack, unpack } from './msgpack.js'
import { isConversationId, isEntryId } from './schema.js'
import { decodeStateVector } from './state-vector.js'

/** What a client offers in the websocket handshake. */
export const SUBPROTOCOL = 'crdt-llm.v1'
/** The version that both sides name in their first frame. */
export const VERSION = 1
/** The largest number of a channel. */
export const CHANNEL_MAX = 2 ** 16 - 1
/** Characters of a principal, a device, a code, or the name of a request. */
export const NAME_CHARACTERS_MAX = 200
/** UTF-8 bytes of a draft hint: a long letter. */
export const DRAFT_BYTES_MAX = 64 << 10
/** Bytes of one update: a whole document. */
export const UPDATE_BYTES_MAX = 16 << 20

const TOKEN_BYTES_MAX = 8 << 10
const REASON_BYTES_MAX = 1 << 10
const LISTED_MAX = 1000
const REQUEST_BYTES_MAX = 16 << 10
const FRAME_BYTES_MAX = UPDATE_BYTES_MAX + (2 << 20)
const AWARENESS_STATES_MAX = 1024
const AWARENESS_STATE_BYTES_MAX = 16 << 10
const PUBLIC_KEY_BYTES = 32
const SIGNATURE_BYTES = 64
const REQUEST_NESTING_MAX = 8
const LOG_BYTES_MAX = 64
const CLIENT_ID_MAX = 2 ** 32 - 1

/** Why an update was not taken, for programs. */
export const CODES = [
  'denied',
  'invalid',
  'gap',
  'too-large',
  'rate-limited',
  'stale-epoch',
  'unavailable'
] as const
/** One of {@link CODES}. */
export type Code = (typeof CODES)[number]

/** Plain values by name, as requests and lists carry them. */
export type Plain = Readonly<Record<string, unknown>>

/** What a client says of its presence: its id, a clock that grows, and JSON (`null` when it went). */
export interface AwarenessState {
  readonly client: number
  readonly clock: number
  readonly json: string | null
}

/** Who is here, or went; both directions. */
export interface PresenceFrame {
  readonly kind: 'presence'
  readonly channel: number
  readonly states: readonly AwarenessState[]
}

/** What a client sends. Each is explained in `crdt_llm/sync/wire/frames.py`. */
export type FromClient =
  | {
      readonly kind: 'hello'
      readonly version: number
      readonly token: string | null
      readonly device: string
      readonly node: Uint8Array | null
    }
  | {
      readonly kind: 'open'
      readonly channel: number
      readonly conversation: string
      readonly log: string | null
      readonly lsn: number
      readonly stateVector: Uint8Array
    }
  | {
      readonly kind: 'update' | 'restore'
      readonly channel: number
      readonly id: number
      readonly update: Uint8Array
    }
  | { readonly kind: 'pull'; readonly channel: number; readonly stateVector: Uint8Array }
  | PresenceFrame
  | {
      readonly kind: 'draft'
      readonly channel: number
      readonly after: string | null
      readonly keep: number
      readonly text: string
    }
  | { readonly kind: 'leave'; readonly channel: number }
  | { readonly kind: 'watch'; readonly on: boolean }
  | {
      readonly kind: 'request'
      readonly id: number
      readonly name: string
      readonly arguments: Plain
    }
  | { readonly kind: 'want-lease'; readonly channel: number; readonly hold: boolean }
  | { readonly kind: 'renew' }

/** A refusal of one update. */
export interface Nack {
  readonly kind: 'nack'
  readonly channel: number
  readonly id: number
  readonly code: Code
  readonly rule: string
  readonly reason: string
  readonly retryMs: number | null
  readonly stateVector: Uint8Array | null
}

/** A conversation as far as the client lacked it. */
export interface Opened {
  readonly kind: 'opened'
  readonly channel: number
  readonly log: string
  readonly lsn: number
  readonly update: Uint8Array
  readonly stateVector: Uint8Array
  readonly grant: string | null
  readonly behind: boolean
}

/** The answer to a Hello. */
export interface Welcome {
  readonly kind: 'welcome'
  readonly version: number
  readonly principal: string
  readonly relay: Uint8Array
  readonly expiresAt: number | null
  readonly log: string
}

/** Conversations of this principal. */
export interface ListedFrame {
  readonly kind: 'listed'
  readonly whole: boolean
  readonly end: boolean
  readonly conversations: readonly (readonly [string, Plain | null])[]
}

/** What came of a request. */
export interface Answer {
  readonly kind: 'answer'
  readonly id: number
  readonly values: Plain | null
  readonly code: string
  readonly reason: string
}

/** What a relay sends. Each is explained in `crdt_llm/sync/wire/frames.py`. */
export type FromRelay =
  | PresenceFrame
  | Welcome
  | Opened
  | {
      readonly kind: 'change' | 'state'
      readonly channel: number
      readonly lsn: number
      readonly update: Uint8Array
    }
  | { readonly kind: 'ack'; readonly channel: number; readonly id: number; readonly lsn: number }
  | Nack
  | {
      readonly kind: 'hint'
      readonly channel: number
      readonly source: number
      readonly after: string | null
      readonly keep: number
      readonly text: string
    }
  | {
      readonly kind: 'closed'
      readonly channel: number
      readonly code: number
      readonly reason: string
    }
  | ListedFrame
  | Answer
  | {
      readonly kind: 'leased'
      readonly channel: number
      readonly epoch: number | null
      readonly signature: Uint8Array
      readonly ttlMs: number
      readonly reason: string
    }
  | { readonly kind: 'renewed'; readonly ttlMs: number }
  | { readonly kind: 'work'; readonly conversations: readonly string[] }

/** Any frame. */
export type Frame = FromClient | FromRelay

// -- forms of fields: each takes what MessagePack gave and answers the value, or throws ----------

type Form = (value: unknown) => unknown

const utf8 = new TextEncoder()

const whole =
  (most: number, least = 0): Form =>
  value => {
    if (typeof value !== 'number' || value < least || value > most) {
      throw malformed(`a whole number from ${least} to ${most} was expected`)
    }
    return value
  }

const text =
  (bytesMax: number, bytesMin = 0): Form =>
  value => {
    if (typeof value !== 'string') throw malformed('text was expected')
    const length = utf8.encode(value).length
    if (length < bytesMin || length > bytesMax) {
      throw malformed(`text of ${bytesMin} to ${bytesMax} bytes was expected`)
    }
    return value
  }

const bytes =
  (most: number, least = 0): Form =>
  value => {
    if (!(value instanceof Uint8Array) || value.length < least || value.length > most) {
      throw malformed(`${least} to ${most} bytes were expected`)
    }
    return value
  }

const maybe =
  (form: Form): Form =>
  value =>
    value === null ? null : form(value)

const flag: Form = value => {
  if (typeof value !== 'boolean') throw malformed('true or false was expected')
  return value
}

const conversation: Form = value => {
  if (!isConversationId(value)) throw malformed('that is no conversation id')
  return value
}

const after: Form = value => {
  if (value !== null && value !== '' && !isEntryId(value)) throw malformed('that is no entry id')
  return value
}

const list = (value: unknown, most: number): unknown[] => {
  if (!Array.isArray(value) || value.length > most) {
    throw malformed(`a list of at most ${most} was expected`)
  }
  return value
}

const awarenessState = (value: unknown): AwarenessState => {
  if (!Array.isArray(value) || value.length !== 3) {
    throw malformed('a state is a client, a clock and JSON')
  }
  const json = maybe(text(AWARENESS_STATE_BYTES_MAX))(value[2]) as string | null
  if (json !== null && parsed(json) === null) throw malformed('who went is nil, not the JSON null')
  return {
    client: whole(CLIENT_ID_MAX)(value[0]) as number,
    clock: number(value[1]) as number,
    json
  }
}

const parsed = (json: string): unknown => {
  try {
    return JSON.parse(json)
  } catch (error) {
    if (error instanceof SyntaxError) throw malformed('a state is JSON')
    throw error
  }
}

/** Plain values with text as keys, not nested too deep; floats become numbers. */
const plain = (value: unknown, depth = 0): unknown => {
  if (depth > REQUEST_NESTING_MAX) throw malformed('values are nested too deep')
  if (value instanceof Fraction) return value.value
  if (value === null || typeof value !== 'object' || value instanceof Uint8Array) return value
  if (Array.isArray(value)) return value.map(item => plain(item, depth + 1))
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, plain(one, depth + 1)]))
}

const map: Form = value => {
  if (
    value === null ||
    typeof value !== 'object' ||
    Array.isArray(value) ||
    value instanceof Uint8Array ||
    value instanceof Fraction
  ) {
    throw malformed('a map was expected')
  }
  const values = plain(value)
  let length: number
  try {
    length = pack(values).length
  } catch (error) {
    if (error instanceof ProviderError) throw malformed(error.message) // a number over 2^53
    throw error
  }
  if (length > REQUEST_BYTES_MAX) throw malformed('a map is too large')
  return values
}

const listed: Form = value =>
  list(value, LISTED_MAX).map(pair => {
    if (!Array.isArray(pair) || pair.length !== 2) {
      throw malformed('a line of the list is an id and its facts')
    }
    return [conversation(pair[0]), maybe(map)(pair[1])]
  })

const code: Form = value => {
  if (!(CODES as readonly unknown[]).includes(value)) throw malformed('no code of a refusal')
  return value
}

const stateVector: Form = value => {
  if (!(value instanceof Uint8Array)) throw malformed('a state vector was expected')
  decodeStateVector(value)
  return value
}

const channel = whole(CHANNEL_MAX)
const number = whole(Number.MAX_SAFE_INTEGER)
const name = text(4 * NAME_CHARACTERS_MAX)
const reason = text(REASON_BYTES_MAX)
const log = text(LOG_BYTES_MAX, 1)
const update = bytes(UPDATE_BYTES_MAX)
const draft = text(DRAFT_BYTES_MAX)
const keep = whole(DRAFT_BYTES_MAX)
const key = bytes(PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES)
const states: Form = value => list(value, AWARENESS_STATES_MAX).map(awarenessState)
const conversations: Form = value => list(value, LISTED_MAX).map(conversation)

type Fields = Readonly<Record<string, Form>>
type Table = Readonly<Record<number, readonly [string, Fields]>>

const presence = ['presence', { channel, states }] as const
const versioned = { channel, id: number, update }
const typed = { after, keep, text: draft }

const FROM_CLIENT: Table = {
  0: [
    'hello',
    { version: number, token: maybe(text(TOKEN_BYTES_MAX)), device: name, node: maybe(key) }
  ],
  1: ['open', { channel, conversation, log: maybe(log), lsn: number, stateVector }],
  2: ['update', versioned],
  3: ['restore', versioned],
  4: ['pull', { channel, stateVector }],
  5: presence,
  6: ['draft', { channel, ...typed }],
  7: ['leave', { channel }],
  8: ['watch', { on: flag }],
  9: ['request', { id: number, name, arguments: map }],
  10: ['want-lease', { channel, hold: flag }],
  11: ['renew', {}]
}

const FROM_RELAY: Table = {
  5: presence,
  32: ['welcome', { version: number, principal: name, relay: key, expiresAt: maybe(number), log }],
  33: [
    'opened',
    { channel, log, lsn: number, update, stateVector, grant: maybe(name), behind: flag }
  ],
  34: ['change', { channel, lsn: number, update }],
  35: ['ack', { channel, id: number, lsn: number }],
  36: [
    'nack',
    {
      channel,
      id: number,
      code,
      rule: name,
      reason,
      retryMs: maybe(number),
      stateVector: maybe(stateVector)
    }
  ],
  37: ['state', { channel, lsn: number, update }],
  38: ['hint', { channel, source: number, ...typed }],
  39: ['closed', { channel, code: whole(4999, 1000), reason }],
  40: ['listed', { whole: flag, end: flag, conversations: listed }],
  41: ['answer', { id: number, values: maybe(map), code: name, reason }],
  42: [
    'leased',
    { channel, epoch: maybe(number), signature: bytes(SIGNATURE_BYTES), ttlMs: number, reason }
  ],
  43: ['renewed', { ttlMs: number }],
  44: ['work', { conversations }]
}

const NUMBERS: ReadonlyMap<string, readonly [number, Fields]> = new Map(
  [FROM_CLIENT, FROM_RELAY].flatMap(table =>
    Object.entries(table).map(([at, [kind, fields]]) => [kind, [Number(at), fields] as const])
  )
)

const bare = (value: unknown): unknown => {
  if (!Array.isArray(value)) return value
  return value.map(one =>
    one !== null && typeof one === 'object' && 'client' in one
      ? [one.client, one.clock, one.json]
      : one
  )
}

/**
 * The bytes of a frame.
 *
 * @throws ProviderError `misuse` if it is larger than any frame may be.
 */
export const encode = (frame: Frame): Uint8Array => {
  const known = NUMBERS.get(frame.kind)
  if (known === undefined) throw misuse(`there is no frame ${frame.kind}`)
  const [at, fields] = known
  const values = frame as unknown as Plain
  const encoded = pack([at, ...Object.keys(fields).map(field => bare(values[field]))])
  if (encoded.length > FRAME_BYTES_MAX) throw misuse('a frame is too large')
  return encoded
}

const decode = (frame: Uint8Array, table: Table): unknown => {
  if (frame.length > FRAME_BYTES_MAX) throw malformed('a frame is too large')
  const parts = unpack(frame)
  if (!Array.isArray(parts) || typeof parts[0] !== 'number') {
    throw malformed('a frame is a list that begins with its kind')
  }
  const known = Object.hasOwn(table, parts[0]) ? table[parts[0]] : undefined
  if (known === undefined) throw malformed(`no frame of kind ${parts[0]} in this direction`)
  const [kind, fields] = known
  const forms = Object.entries(fields)
  if (parts.length !== 1 + forms.length) throw malformed(`a ${kind} has ${forms.length} fields`)
  const message: Record<string, unknown> = { kind }
  forms.forEach(([field, form], i) => {
    message[field] = form(parts[i + 1])
  })
  return message
}

/**
 * The message that a relay sent. Total: any bytes give a message or an error.
 *
 * @throws ProviderError `malformed`.
 */
export const decodeFromRelay = (frame: Uint8Array): FromRelay =>
  decode(frame, FROM_RELAY) as FromRelay

/**
 * The message that a client sent; a relay in a test needs it.
 *
 * @throws ProviderError `malformed`.
 */
export const decodeFromClient = (frame: Uint8Array): FromClient =>
  decode(frame, FROM_CLIENT) as FromClient
