/**
 * The document's words: ids, roles, limits, and typed readings of plain values.
 *
 * This module owns what a value in the document *means*. It must not know Yjs, sockets or storage.
 * Every `read…` function is total: it takes any value that a replica could hold and gives a typed
 * one, or `null` where the value is malformed, because in a replicated document what is malformed
 * counts as absent, on every replica alike (protocol/SCHEMA.md, section 2).
 */

import { digest as sha256 } from 'lib0/hash/sha256'
import type { Born, Grant, Meta, Params, Policy, Proof, Role, State, Usage } from './api.js'

/** The virtual admitted entry that every path starts at. */
export const ROOT = ''
/** What `meta.schema` says. */
export const SCHEMA_VERSION = 1
/** UTF-8 bytes of one entry's text. */
export const TEXT_BYTES_MAX = 1 << 20
/** Characters of a title, or of a model's name. */
export const TITLE_CHARACTERS_MAX = 500
/** Characters of a principal, a device or a call's id. */
export const NAME_CHARACTERS_MAX = 200
/** Bytes of a birth's nonce. */
export const NONCE_BYTES = 16

const STOP_MAX = 16
const STOP_CHARACTERS_MAX = 200
const MAX_TOKENS_MAX = 1_000_000
const ID_CHARACTERS = 22
const CROCKFORD = '0123456789ABCDEFGHJKMNPQRSTVWXYZ'
const ULID_RANDOM_BYTES = 10

const ROLES: ReadonlySet<unknown> = new Set(['system', 'user', 'assistant', 'tool'])
const STATES: ReadonlySet<unknown> = new Set([
  'streaming',
  'done',
  'stopped',
  'failed',
  'superseded'
])
const ENDED: ReadonlySet<unknown> = new Set(['done', 'stopped', 'failed', 'superseded'])
const GRANTS: ReadonlySet<unknown> = new Set(['owner', 'writer', 'reader'])

/** The values of a policy; the first of each is the default. */
export const POLICY_VALUES = {
  reply: ['ask', 'auto'],
  on_new_entry: ['queue', 'interrupt'],
  overflow: ['refuse', 'drop_oldest', 'summarise'],
  reasoning: ['hidden', 'visible']
} as const

/** Fills an array with random bytes; `crypto.getRandomValues` outside of tests. */
export type Random = (bytes: Uint8Array<ArrayBuffer>) => Uint8Array<ArrayBuffer>

// -- ids ---------------------------------------------------------------------------------------

/** Whether `value` has the form of a conversation id. */
export const isConversationId = (value: unknown): value is string =>
  typeof value === 'string' && /^[A-Za-z0-9_-]{22}$/.test(value)

/** Whether `value` is a ULID in canonical form. */
export const isEntryId = (value: unknown): value is string =>
  typeof value === 'string' && /^[0-7][0-9A-HJKMNP-TV-Z]{25}$/.test(value)

/** The id that a birth stands for: 22 characters of base64url(SHA-256(owner ‖ nonce)). */
export const conversationId = (owner: string, nonce: Uint8Array): string =>
  base64url(sha256(joined(utf8(owner), nonce))).slice(0, ID_CHARACTERS)

/** A ULID from a time in ms and 10 random bytes. */
export const entryId = (atMs: number, random: Random): string => {
  let bits = BigInt(Math.trunc(atMs))
  for (const byte of random(new Uint8Array(ULID_RANDOM_BYTES))) bits = (bits << 8n) | BigInt(byte)
  let id = ''
  for (let i = 0; i < 26; i++, bits >>= 5n) id = CROCKFORD.charAt(Number(bits & 31n)) + id
  return id
}

// -- bytes -------------------------------------------------------------------------------------

/** The UTF-8 bytes of a text. */
export const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text)

/** Byte strings, one after the other. */
export const joined = (...parts: readonly Uint8Array[]): Uint8Array => {
  const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0))
  let at = 0
  for (const part of parts) {
    out.set(part, at)
    at += part.length
  }
  return out
}

/** Unpadded base64url (RFC 4648, section 5). */
export const base64url = (bytes: Uint8Array): string =>
  btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(''))
    .replaceAll('+', '-')
    .replaceAll('/', '_')
    .replaceAll('=', '')

// -- plain values ------------------------------------------------------------------------------

/** A plain map: neither a list, nor bytes, nor a shared type. */
export const isMap = (value: unknown): value is Record<string, unknown> => {
  if (value === null || typeof value !== 'object') return false
  const prototype: unknown = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}

const isBytes = (value: unknown): value is Uint8Array => value instanceof Uint8Array

/** Numbers beyond 32 bits may come as `bigint` from other implementations. */
const number = (value: unknown): number | null => {
  if (typeof value === 'bigint') return Number(value)
  return typeof value === 'number' ? value : null
}

/** `value` if it is a whole number within [low, high]. */
export const whole = (
  value: unknown,
  low: number,
  high = Number.MAX_SAFE_INTEGER
): number | null => {
  const given = number(value)
  return given !== null && Number.isSafeInteger(given) && given >= low && given <= high
    ? given + 0 // -0 is 0
    : null
}

const real = (value: unknown, low: number, high: number): number | null => {
  const given = number(value)
  return given !== null && given >= low && given <= high ? given : null
}

/** Characters of a text, as every implementation counts them: code points. */
export const characters = (text: string): number => {
  let count = 0
  for (const _ of text) count++
  return count
}

const name = (value: unknown, charactersMax: number): string | null =>
  typeof value === 'string' && (value.length <= charactersMax || characters(value) <= charactersMax)
    ? value
    : null

const textOf = (value: unknown): string | null => (typeof value === 'string' ? value : null)

/** `value` without what is `null` or `undefined`. */
const present = <T extends object>(value: T): { [K in keyof T]?: NonNullable<T[K]> } =>
  Object.fromEntries(
    Object.entries(value).filter(([, one]) => one !== null && one !== undefined)
  ) as { [K in keyof T]?: NonNullable<T[K]> }

/** A slot's parameters; what is malformed counts as absent, one by one. */
export const readParams = (value: unknown): Params & { readonly extend?: boolean } => {
  if (!isMap(value)) return {}
  const stop = (Array.isArray(value.stop) ? value.stop : [])
    .filter((one): one is string => !!name(one, STOP_CHARACTERS_MAX))
    .slice(0, STOP_MAX)
  return present({
    max_tokens: whole(value.max_tokens, 1, MAX_TOKENS_MAX),
    temperature: real(value.temperature, 0, 100),
    top_p: real(value.top_p, 0, 1),
    top_k: whole(value.top_k, 0),
    seed: whole(value.seed, 0),
    stop: stop.length ? stop : null,
    ignore_eos: value.ignore_eos === true || null,
    extend: value.extend === true || null
  })
}

/** `born`, or `null`: a known role and a whole clock of at least 1 make it well-formed. */
export const readBorn = (value: unknown): Born | null => {
  if (!isMap(value) || !ROLES.has(value.role)) return null
  const clock = whole(value.clock, 1)
  if (clock === null) return null
  return {
    role: value.role as Role,
    author: name(value.author, NAME_CHARACTERS_MAX) ?? '',
    device: name(value.device, NAME_CHARACTERS_MAX) ?? '',
    at: whole(value.at, 0) ?? 0,
    clock,
    fork: value.mode === 'fork',
    after: textOf(value.after) ?? ROOT,
    params: readParams(value.params),
    call: textOf(value.call),
    covers: readCovers(value.covers)
  }
}

const readCovers = (value: unknown): readonly [string, string] | null =>
  Array.isArray(value) &&
  value.length === 2 &&
  typeof value[0] === 'string' &&
  typeof value[1] === 'string'
    ? [value[0], value[1]]
    : null

/** `place`, or `null`. */
export const readPlace = (value: unknown): { parent: string; epoch: number } | null => {
  if (!isMap(value) || typeof value.parent !== 'string') return null
  const epoch = whole(value.epoch, 0)
  return epoch === null ? null : { parent: value.parent, epoch }
}

/** `state`, or `null`. */
export const readState = (value: unknown): State | null =>
  STATES.has(value) ? (value as State) : null

/** Whether a slot in this state has ended. */
export const isEnded = (state: State | null): boolean => ENDED.has(state)

/** `redacted`, or `null`. Any map withdraws, whatever it says. */
export const readRedacted = (value: unknown): { by: string; at: number } | null =>
  isMap(value) ? { by: textOf(value.by) ?? '', at: whole(value.at, 0) ?? 0 } : null

/** `proof`, or `null`. */
export const readProof = (value: unknown): Proof | null => {
  if (!isMap(value) || !isBytes(value.digest) || !isBytes(value.signature)) return null
  return {
    content: readBytes(value.content),
    tokens: readBytes(value.tokens),
    calls: readBytes(value.calls),
    digest: value.digest,
    signature: value.signature
  }
}

/** Bytes, or `null`. */
export const readBytes = (value: unknown): Uint8Array | null => (isBytes(value) ? value : null)

/** `usage`, or `null`. */
export const readUsage = (value: unknown): Usage | null => {
  if (!isMap(value)) return null
  const error = isMap(value.error) ? value.error : null
  const count = (given: unknown): number => whole(given, 0) ?? 0
  const prompt = count(value.prompt)
  const prefilled = count(value.prefilled)
  return {
    prompt,
    prefilled,
    reused: prompt - prefilled,
    drafted: count(value.drafted),
    sampled: count(value.sampled),
    ttft_ms: whole(value.ttft_ms, 0),
    total_ms: whole(value.total_ms, 0),
    finish: textOf(value.finish),
    error:
      typeof error?.code === 'string'
        ? { code: error.code, message: textOf(error.message) ?? '' }
        : null
  }
}

/** A list of texts (`reads`), or `null`. */
export const readStrings = (value: unknown): readonly string[] | null =>
  Array.isArray(value) && value.every(one => typeof one === 'string') ? value : null

/** A right, or `null`. */
export const readGrant = (value: unknown): Grant | null =>
  GRANTS.has(value) ? (value as Grant) : null

/** `birth`, or `null`. */
export const readBirth = (value: unknown): { owner: string; nonce: Uint8Array } | null => {
  if (!isMap(value)) return null
  const owner = name(value.owner, NAME_CHARACTERS_MAX)
  const nonce = readBytes(value.nonce)
  return owner && nonce?.length === NONCE_BYTES ? { owner, nonce } : null
}

/** The policy; what is malformed or unknown counts as the default. */
export const readPolicy = (value: unknown): Policy => {
  const given = isMap(value) ? value : {}
  return Object.fromEntries(
    Object.entries(POLICY_VALUES).map(([key, values]) => [
      key,
      (values as readonly unknown[]).includes(given[key]) ? given[key] : values[0]
    ])
  ) as unknown as Policy
}

/** The root `meta`, key by key. */
export const readMeta = (get: (key: string) => unknown): Meta => ({
  title: name(get('title'), TITLE_CHARACTERS_MAX) ?? '',
  createdAt: whole(get('created_at'), 0),
  head: textOf(get('head')) ?? ROOT,
  model: textOf(get('model')),
  policy: readPolicy(get('policy')),
  owner: readBirth(get('birth'))?.owner ?? null
})
