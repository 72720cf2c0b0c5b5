/** Reads `protocol/vectors`, the data that every implementation is tested against. */

import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

export const vectors = (name: string): unknown =>
  JSON.parse(
    readFileSync(
      fileURLToPath(new URL(`../../../protocol/vectors/${name}`, import.meta.url)),
      'utf8'
    )
  )

export const unhex = (hex: string): Uint8Array => Uint8Array.from(Buffer.from(hex, 'hex'))
export const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
