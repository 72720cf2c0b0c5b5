import { describe, expect, it } from 'vitest'
import { ProviderError } from '../src/errors.js'
import {
  decodeFromClient,
  decodeFromRelay,
  encode,
  type Frame,
  type FromRelay
} from '../src/frames.js'
import { pack } from '../src/msgpack.js'
import { decodeStateVector, encodeStateVector } from '../src/state-vector.js'
import { hex, unhex, vectors } from './vectors.js'

interface Vectors {
  frames: {
    meaning: string
    name: string
    from: ('client' | 'relay')[]
    hex: string
    fields: Record<string, unknown>
  }[]
  malformed: { why: string; from: 'client' | 'relay'; hex: string }[]
}

const { frames, malformed } = vectors('frames.json') as Vectors
const decoders = { client: decodeFromClient, relay: decodeFromRelay }

const camel = (name: string): string => name.replace(/_(.)/g, (_, letter) => letter.toUpperCase())
const kebab = (name: string): string =>
  name.replace(/(?<=.)[A-Z]/g, letter => `-${letter}`).toLowerCase()

/** A value of the vectors, as this package has it. */
const value = (field: string, given: unknown): unknown => {
  if (given !== null && typeof given === 'object' && 'hex' in given) return unhex(String(given.hex))
  if (field === 'states') {
    return (given as unknown[][]).map(([client, clock, json]) => ({ client, clock, json }))
  }
  return given
}

const message = ({ name, fields }: Vectors['frames'][number]): Frame =>
  ({
    kind: kebab(name),
    ...Object.fromEntries(
      Object.entries(fields).map(([field, given]) => [camel(field), value(field, given)])
    )
  }) as Frame

describe('frames', () => {
  it('are all in the vectors', () => {
    expect(new Set(frames.map(one => one.name)).size).toBe(25)
  })

  it.each(frames)('$name: $meaning', one => {
    expect(hex(encode(message(one)))).toBe(one.hex)
    for (const from of one.from) expect(decoders[from](unhex(one.hex))).toEqual(message(one))
  })

  it.each(malformed)('$from: $why is malformed', ({ from, hex: bytes }) => {
    expect(() => decoders[from](unhex(bytes))).toThrowError(
      expect.objectContaining({ code: 'malformed' })
    )
  })

  it('are messages or errors of this package, whichever byte of them is another', () => {
    const understood = (bytes: Uint8Array): number => {
      let count = 0
      for (const decode of Object.values(decoders)) {
        try {
          decode(bytes)
          count++
        } catch (error) {
          if (!(error instanceof ProviderError)) throw error
        }
      }
      return count
    }
    let count = 0
    for (const one of frames) {
      for (let at = 0; at < one.hex.length / 2; at++) {
        for (const change of [0x01, 0x80, 0xff]) {
          const bytes = unhex(one.hex)
          bytes[at] = (bytes[at] ?? 0) ^ change
          count += understood(bytes)
        }
      }
    }
    expect(count).toBeGreaterThan(1_000) // many bytes are text or updates
  })

  it.each([
    [35, 1, 1.5, 1],
    [35, 1, null, 1],
    [37, 1, 1, new Uint8Array((16 << 20) + 1)],
    [
      40,
      true,
      true,
      [['A'.repeat(22), { a: { a: { a: { a: { a: { a: { a: { a: { a: 1 } } } } } } } } }]]
    ],
    [40, true, true, [['A'.repeat(22), { a: 'x'.repeat(17_000) }]]],
    [40, true, true, Array.from({ length: 1_001 }, () => ['A'.repeat(22), null])],
    [39, 1, 5000, '']
  ])('over a limit are malformed (%#)', (...parts) => {
    expect(() => decodeFromRelay(pack(parts))).toThrowError(
      expect.objectContaining({ code: 'malformed' })
    )
  })

  it('may hold floats in what a request carries', () => {
    const answer: FromRelay = { kind: 'answer', id: 1, values: { at: 0.5 }, code: '', reason: '' }
    expect(decodeFromRelay(encode(answer))).toEqual(answer)
  })
})

describe('state vectors', () => {
  it.each(['00', '014d02', '02ffffffff0f8080808008000a'])('%s is read and written', bytes => {
    expect(hex(encodeStateVector(decodeStateVector(unhex(bytes))))).toBe(bytes)
  })

  it.each([
    '',
    '01',
    '0101',
    '0000',
    '800100',
    '0201010101',
    '01ffffffff1f00',
    '8080808080808080',
    'ffffff7f'
  ])('%j is none', bytes => {
    expect(() => decodeStateVector(unhex(bytes))).toThrowError(
      expect.objectContaining({ code: 'malformed' })
    )
  })
})
