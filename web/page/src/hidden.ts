// Hidden fields, opened with the operator's key: exact token ids, their kinds, and how they were
// sampled (protocol/SCHEMA.md, section 8). The key stays in memory, in a value of this page alone.

import { chacha20poly1305 } from '@noble/ciphers/chacha.js'
import { hkdf } from '@noble/hashes/hkdf.js'
import { sha256 } from '@noble/hashes/sha2.js'
import { bytesToHex, concatBytes, hexToBytes, utf8ToBytes } from '@noble/hashes/utils.js'
import { unpack } from 'crdt-llm-provider/msgpack'

const MASTER_BYTES = 32
const FINAL_CHUNK = 2 ** 32 - 1
const KEY_ID_BYTES = 8

/** A reply's hidden state. */
export interface Hidden {
  readonly ids: readonly number[]
  /** Runs of `[kind, count]`. */
  readonly kinds: readonly (readonly [string, number])[]
  /** Natural logarithms, one for each id that is not injected. */
  readonly logprobs: readonly number[]
  readonly model: string
  readonly renderer: string
  readonly params: Readonly<Record<string, unknown>>
}

/** The master key as an operator has it: 64 hexadecimal digits, or base64 of 32 bytes. */
export function readKey(text: string): Uint8Array {
  const trimmed = text.trim()
  const bytes = /^[0-9a-f]{64}$/i.test(trimmed)
    ? hexToBytes(trimmed.toLowerCase())
    : fromBase64(trimmed)
  if (bytes?.length !== MASTER_BYTES) {
    throw new Error('A key is 64 hexadecimal digits, or 32 bytes as base64.')
  }
  return bytes
}

function fromBase64(text: string): Uint8Array | null {
  try {
    const binary = atob(text.replaceAll('-', '+').replaceAll('_', '/'))
    return Uint8Array.from(binary, character => character.charCodeAt(0))
  } catch {
    return null
  }
}

export const keyIdOf = (master: Uint8Array): string =>
  bytesToHex(sha256(concatBytes(utf8ToBytes('crdt-llm/1/key'), master)).slice(0, KEY_ID_BYTES))

const uint32 = (number: number): Uint8Array => {
  const bytes = new Uint8Array(4)
  new DataView(bytes.buffer).setUint32(0, number)
  return bytes
}

/** A float16 as a number (IEEE 754, binary16). */
export function half(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 0x1f
  const fraction = bits & 0x3ff
  if (exponent === 0) return sign * fraction * 2 ** -24
  if (exponent === 0x1f) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}

const view = (bytes: Uint8Array): DataView =>
  new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)

function readHidden(value: unknown): Hidden {
  const map = value as Record<string, unknown>
  if (
    !(
      map?.ids instanceof Uint8Array &&
      map.logprobs instanceof Uint8Array &&
      Array.isArray(map.kinds)
    )
  ) {
    throw new Error('A sealed field holds no hidden state.')
  }
  const ids = view(map.ids)
  const logprobs = view(map.logprobs)
  return {
    ids: Array.from({ length: map.ids.length >> 2 }, (_, at) => ids.getUint32(at * 4, true)),
    kinds: map.kinds as [string, number][],
    logprobs: Array.from({ length: map.logprobs.length >> 1 }, (_, at) =>
      half(logprobs.getUint16(at * 2, true))
    ),
    model: String(map.model ?? ''),
    renderer: String(map.renderer ?? ''),
    params: (map.params ?? {}) as Record<string, unknown>
  }
}

/**
 * Opens all of a reply's blobs: its chunks in order, or the one that replaced them.
 *
 * @throws Error with a line for people: another key, another place, or changed bytes.
 */
export function openReply(
  master: Uint8Array,
  conversation: string,
  entry: string,
  blobs: readonly Uint8Array[]
): Hidden {
  if (blobs.length === 0) throw new Error('Nothing is sealed here.')
  const key = hkdf(sha256, master, undefined, utf8ToBytes(`crdt-llm/1/seal${conversation}`), 32)
  const ours = keyIdOf(master)
  const open = (blob: Uint8Array, chunk: number): Hidden => {
    const [format, keyId, nonce, sealed] = unpack(blob) as unknown[]
    if (format !== 1 || !(nonce instanceof Uint8Array && sealed instanceof Uint8Array)) {
      throw new Error('A sealed field has not the form of one.')
    }
    if (keyId !== ours)
      throw new Error(`It was sealed with the key ${String(keyId)}; this one is ${ours}.`)
    const associated = concatBytes(utf8ToBytes(conversation + entry), uint32(chunk))
    return readHidden(unpack(chacha20poly1305(key, nonce, associated).decrypt(sealed)))
  }
  const [first] = blobs
  if (blobs.length === 1 && first !== undefined) {
    try {
      return open(first, FINAL_CHUNK)
    } catch {
      // Then it is the first chunk of a reply that streams; if not, what follows says what is wrong.
    }
  }
  const parts = blobs.map(open)
  const [head] = parts
  return {
    ids: parts.flatMap(part => part.ids),
    kinds: parts.flatMap(part => part.kinds),
    logprobs: parts.flatMap(part => part.logprobs),
    model: head?.model ?? '',
    renderer: head?.renderer ?? '',
    params: head?.params ?? {}
  }
}
