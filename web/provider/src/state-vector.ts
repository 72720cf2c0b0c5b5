/**
 * State vectors: of each client the first clock that is not known.
 *
 * This module owns their bytes and comparing them. It must not know documents or frames.
 * Source: the `stateVector` of https://github.com/yjs/y-protocols/blob/master/PROTOCOL.md
 */

import { malformed } from './errors.js'

/** Clients in one state vector; a document of 100,000 entries by people stays far below. */
const CLIENTS_MAX = 1 << 16
/** Client ids and clocks have 32 bits on the wire. */
const BITS_32_MAX = 2 ** 32 - 1

/** Client id -> the first clock of that client that is not known. */
export type StateVector = ReadonlyMap<number, number>

/** The state vector of a replica that has nothing. */
export const NOTHING: StateVector = new Map()

/**
 * Read a state vector.
 *
 * @throws ProviderError `malformed`: no state vector, a client twice, or over a limit.
 */
export const decodeStateVector = (bytes: Uint8Array): StateVector => {
  let at = 0
  const number = (): number => {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++]
      if (byte === undefined) throw malformed('a state vector is cut')
      value += (byte & 0x7f) * scale
      if (value > BITS_32_MAX) throw malformed('a number in a state vector is over 32 bits')
      if (byte < 0x80) {
        if (byte === 0 && scale > 1) throw malformed('a number is longer than needed')
        return value
      }
    }
  }
  const count = number()
  if (count > CLIENTS_MAX) throw malformed('a state vector has too many clients')
  const clocks = new Map<number, number>()
  for (let i = 0; i < count; i++) clocks.set(number(), number())
  if (clocks.size !== count) throw malformed('a state vector names a client twice')
  if (at !== bytes.length) throw malformed('bytes follow a state vector')
  return clocks
}

/** The bytes of a state vector. */
export const encodeStateVector = (clocks: StateVector): Uint8Array => {
  const out: number[] = []
  const number = (given: number): void => {
    let value = given
    for (; value > 0x7f; value = Math.floor(value / 128)) out.push((value % 128) | 0x80)
    out.push(value)
  }
  number(clocks.size)
  for (const [client, clock] of clocks) {
    number(client)
    number(clock)
  }
  return Uint8Array.from(out)
}

/** Whether `known` has everything that `wanted` speaks of. */
export const covers = (known: StateVector, wanted: StateVector): boolean => {
  for (const [client, clock] of wanted) if ((known.get(client) ?? 0) < clock) return false
  return true
}
