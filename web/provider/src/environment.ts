/**
 * What lies outside: time, timers and randomness, as an argument.
 *
 * This module owns that seam. It must not know what anybody does with it.
 */

import type { Random } from './schema.js'

/** Time, timers and randomness. */
export interface Environment {
  /** Ms since 1970. */
  readonly now: () => number
  /** Fills an array with bytes that nobody can predict. */
  readonly random: Random
  /** Calls `run` once, after `ms`; the answer calls that off. */
  readonly later: (ms: number, run: () => void) => () => void
}

/** The real one, in browsers and in Node. */
export const realEnvironment: Environment = {
  now: () => Date.now(),
  random: bytes => crypto.getRandomValues(bytes),
  later: (ms, run) => {
    const timer = setTimeout(run, ms)
    return () => clearTimeout(timer)
  }
}

/** A number of 32 bits that is not 0: what client ids are. */
export const clientId = (random: Random): number => {
  for (;;) {
    const [drawn] = new Uint32Array(random(new Uint8Array(4)).buffer)
    if (drawn) return drawn
  }
}

/** A name that nobody else draws. */
export const uniqueName = (random: Random): string =>
  Array.from(random(new Uint8Array(12)), byte => byte.toString(16).padStart(2, '0')).join('')
