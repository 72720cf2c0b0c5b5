/**
 * The chain: whether what a replica shows is what the node committed to, and in that order.
 *
 * This module owns recomputing digests and checking signatures (protocol/SCHEMA.md, section 7). It
 * must not know connections or storage, and decides nothing: it says of each entry what it found.
 *
 * Ed25519 is the browser's own where it has it. Elsewhere (older browsers, pages without TLS) the
 * implementation of the noble project is loaded, when it is first needed.
 */

import { digest as sha256 } from 'lib0/hash/sha256'
import type { Entry, Verdict } from './api.js'
import type { Document } from './document.js'
import { pack } from './msgpack.js'
import { isMap, joined, utf8 } from './schema.js'

/** Whether a signature by a key holds. */
export type CheckSignature = (
  key: Uint8Array,
  signature: Uint8Array,
  message: Uint8Array
) => Promise<boolean>

const KEY_BYTES = 32
const SIGNATURE_BYTES = 64

/** By the browser's own Ed25519; `null` where it has none. */
const nativeCheck = async (): Promise<CheckSignature | null> => {
  const subtle = globalThis.crypto?.subtle
  if (subtle === undefined) return null
  const imported = (key: Uint8Array): Promise<CryptoKey> =>
    subtle.importKey('raw', key.slice(), { name: 'Ed25519' }, false, ['verify'])
  try {
    await imported(BASE_POINT)
  } catch (error) {
    if (error instanceof DOMException) return null // it does not know the algorithm
    throw error
  }
  return async (key, signature, message) => {
    try {
      const checked = await imported(key)
      return await subtle.verify('Ed25519', checked, signature.slice(), message.slice())
    } catch (error) {
      if (error instanceof DOMException) return false // no point of the curve
      throw error
    }
  }
}

/** A key that every implementation takes. */
const BASE_POINT = Uint8Array.from([0x58, ...new Array<number>(31).fill(0x66)])

/** By the noble project's Ed25519. */
export const nobleCheck = async (): Promise<CheckSignature> => {
  const [{ verify, hashes }, { sha512 }] = await Promise.all([
    import('@noble/ed25519'),
    import('@noble/hashes/sha2.js')
  ])
  hashes.sha512 = sha512
  return async (key, signature, message) => verify(signature, message, key)
}

let checking: Promise<CheckSignature> | null = null

/** The best implementation that there is, found once. */
export const signatureCheck = (): Promise<CheckSignature> => {
  checking ??= nativeCheck().then(native => native ?? nobleCheck())
  return checking
}

// -- bytes -------------------------------------------------------------------------------------

/** A plain value in the form in which every replica gets the same bytes for it. */
export const canonical = (value: unknown): unknown => {
  if (value === undefined) return null
  if (typeof value === 'bigint') return Number(value)
  if (Array.isArray(value)) return value.map(canonical)
  if (!isMap(value)) return value
  return Object.keys(value)
    .sort(byCodePoint)
    .map(key => [key, canonical(value[key])])
}

/** JavaScript compares code units, which puts surrogate pairs before U+E000 to U+FFFF. */
const byCodePoint = (a: string, b: string): number => {
  const [left, right] = [[...a], [...b]]
  for (let i = 0; i < Math.min(left.length, right.length); i++) {
    const difference = (left[i]?.codePointAt(0) ?? 0) - (right[i]?.codePointAt(0) ?? 0)
    if (difference !== 0) return difference
  }
  return left.length - right.length
}

const uint64 = (value: number): Uint8Array => {
  const bytes = new Uint8Array(8)
  new DataView(bytes.buffer).setBigUint64(0, BigInt(value))
  return bytes
}

/** Where a conversation's chain begins. */
export const rootDigest = (conversation: string): Uint8Array =>
  sha256(utf8(`crdt-llm/1/root${conversation}`))

/** The commitment to a text. */
export const commitContent = (salt: Uint8Array, text: string): Uint8Array =>
  sha256(joined(salt, utf8(text)))

/** The digest of an entry behind its parent's. */
export const entryDigest = (entry: Entry, born: unknown, parent: Uint8Array): Uint8Array => {
  const { proof } = entry
  const said = pack([
    entry.id,
    canonical(born),
    proof?.content ?? null,
    proof?.tokens ?? null,
    proof?.calls ?? null,
    entry.reads,
    entry.isSlot ? entry.state : null
  ])
  return sha256(joined(utf8('crdt-llm/1/entry'), parent, said))
}

/** What a node signs of an entry. */
export const proofMessage = (conversation: string, epoch: number, digest: Uint8Array): Uint8Array =>
  joined(utf8(`crdt-llm/1/proof${conversation}`), uint64(epoch), digest)

/** What a relay signs to make a key the node's under an epoch. */
export const leaseMessage = (conversation: string, epoch: number, node: Uint8Array): Uint8Array =>
  joined(utf8(`crdt-llm/1/lease${conversation}`), uint64(epoch), node)

const equal = (a: Uint8Array | null, b: Uint8Array): boolean =>
  a !== null && a.length === b.length && a.every((byte, i) => byte === b[i])

// -- the walk ----------------------------------------------------------------------------------

/** What is looked at, and by what. */
interface Chain {
  readonly document: Document
  readonly conversation: string
  readonly relay: Uint8Array | null
  readonly check: CheckSignature
  /** Epoch -> whether the relay signed its lease. */
  readonly leases: Map<number, boolean>
}

/**
 * Walk a path from the root and say of each admitted entry whether it holds. Ends before the first
 * entry without a proof yet (a pending one, or a reply that is still streaming), and after the first
 * that does not hold: what is behind it builds on it.
 *
 * @param document The replica.
 * @param conversation Its id.
 * @param path As {@link Tree.path} gives it.
 * @param relay The relay's pinned key; without one the signatures of leases are not checked.
 */
export const verifyPath = async (
  document: Document,
  conversation: string,
  path: readonly string[],
  relay: Uint8Array | null,
  by?: CheckSignature
): Promise<Verdict[]> => {
  const holds = by ?? (await signatureCheck())
  const check: CheckSignature = async (key, signature, message) =>
    key.length === KEY_BYTES &&
    signature.length === SIGNATURE_BYTES &&
    holds(key, signature, message)
  const chain: Chain = { document, conversation, relay, check, leases: new Map() }
  const verdicts: Verdict[] = []
  let digest = rootDigest(conversation)
  for (const id of path) {
    const entry = document.entry(id, false)
    if (entry === undefined || !document.tree.isAdmitted(id)) break
    if (entry.isSlot && entry.state === 'streaming') break
    const problem = await problemOf(chain, entry, digest)
    verdicts.push({ entry: id, digest: entry.proof?.digest ?? null, problem })
    if (problem !== null || entry.proof === null) break
    digest = entry.proof.digest
  }
  return verdicts
}

const problemOf = async (
  chain: Chain,
  entry: Entry,
  parent: Uint8Array
): Promise<string | null> => {
  const { proof, place } = entry
  if (proof === null || place === null) return 'no proof'
  if (entry.redacted === null) {
    const { salt } = entry
    if (salt === null || !equal(proof.content, commitContent(salt, entry.content))) {
      return 'the text is not the one that was committed to'
    }
  }
  const { document, conversation } = chain
  if (!equal(entryDigest(entry, document.bornPlain(entry.id), parent), proof.digest)) {
    return 'the digest does not follow from the entries before it'
  }
  if (document.lease(place.epoch) === null) return `no lease for epoch ${place.epoch}`
  // A reply may be taken over: its end may be signed under any later lease.
  const epochs = entry.isSlot ? document.epochs(place.epoch) : [place.epoch]
  for (const epoch of epochs) {
    const lease = document.lease(epoch)
    if (lease === null) continue
    const message = proofMessage(conversation, epoch, proof.digest)
    if (!(await chain.check(lease.node, proof.signature, message))) continue
    return (await isLeased(chain, epoch, lease)) ? null : 'the relay did not sign the lease'
  }
  return 'the proof is not signed by the node'
}

const isLeased = async (
  { relay, leases, check, conversation }: Chain,
  epoch: number,
  { node, signature }: { node: Uint8Array; signature: Uint8Array }
): Promise<boolean> => {
  if (relay === null) return true
  const known = leases.get(epoch)
  if (known !== undefined) return known
  const holds = await check(relay, signature, leaseMessage(conversation, epoch, node))
  leases.set(epoch, holds)
  return holds
}
