import { isDeepStrictEqual } from 'node:util'
import { describe, expect, it } from 'vitest'
import { ProviderError } from '../src/errors.js'
import { Fraction, pack, unpack } from '../src/msgpack.js'
import { hex, unhex } from './vectors.js'

/** Values and their shortest bytes, by the specification's table of formats. */
const SHORTEST: [unknown, string][] = [
  [null, 'c0'],
  [false, 'c2'],
  [true, 'c3'],
  [0, '00'],
  [127, '7f'],
  [128, 'cc80'],
  [255, 'ccff'],
  [256, 'cd0100'],
  [65_535, 'cdffff'],
  [65_536, 'ce00010000'],
  [2 ** 32 - 1, 'ceffffffff'],
  [2 ** 32, 'cf0000000100000000'],
  [Number.MAX_SAFE_INTEGER, 'cf001fffffffffffff'],
  [-1, 'ff'],
  [-32, 'e0'],
  [-33, 'd0df'],
  [-128, 'd080'],
  [-129, 'd1ff7f'],
  [-32_769, 'd2ffff7fff'],
  [-(2 ** 31) - 1, 'd3ffffffff7fffffff'],
  ['', 'a0'],
  ['ä', 'a2c3a4'],
  ['\ufeffa', 'a4efbbbf61'],
  ['x'.repeat(32), `d920${'78'.repeat(32)}`],
  [new Uint8Array([1, 2]), 'c4020102'],
  [[], '90'],
  [[1, ['a']], '920191a161'],
  [{}, '80'],
  [{ a: 1, ['__proto__']: 2 }, '82a16101a95f5f70726f746f5f5f02']
]

describe('MessagePack', () => {
  it.each(SHORTEST)('writes and reads %j', (value, bytes) => {
    expect(hex(pack(value))).toBe(bytes)
    expect(unpack(unhex(bytes))).toEqual(value)
  })

  it('keeps numbers with a point apart', () => {
    expect(hex(pack(0.5))).toBe('cb3fe0000000000000')
    expect(unpack(unhex('cb401c000000000000'))).toEqual(new Fraction(7))
    expect(unpack(unhex('ca40e00000'))).toEqual(new Fraction(7))
    expect(hex(pack(-0))).toBe('00')
  })

  it.each([16, 300, 70_000])('writes and reads %d of each', length => {
    const list = Array.from({ length }, (_, i) => i)
    const map = Object.fromEntries(list.map(i => [`k${i}`, i]))
    for (const value of [list, map, 'ü'.repeat(length), new Uint8Array(length).fill(7)]) {
      const read = unpack(pack(value))
      expect(isDeepStrictEqual(read, value)).toBe(true) // what vitest does takes a second
    }
  })

  it('gives bytes that do not change with the frame they came in', () => {
    const frame = unhex('c4020102')
    const read = unpack(frame) as Uint8Array
    frame.fill(9)
    expect([...read]).toEqual([1, 2])
  })

  it.each([
    '',
    'c1',
    'c0c0',
    'a1ff',
    'a3eda080',
    'd9',
    '91',
    'dfffffffff',
    'ddffffffff',
    'c6ffffffff',
    '81c0c0',
    'd40000',
    '92c0',
    'cf00'
  ])('refuses %s', bytes => {
    expect(() => unpack(unhex(bytes))).toThrowError(expect.objectContaining({ code: 'malformed' }))
  })

  it('refuses what nests too deep, both ways', () => {
    expect(() => unpack(new Uint8Array(20_000).fill(0x91))).toThrow(/deep/)
    let deep: unknown = null
    for (let i = 0; i < 20; i++) deep = [deep]
    expect(() => pack(deep)).toThrow(/deep/)
  })

  it('answers every short input with a value or an error of its own', () => {
    let values = 0
    for (let a = 0; a < 256; a++) {
      for (let b = 0; b < 256; b++) {
        try {
          unpack(Uint8Array.of(a, b, 0))
          values++
        } catch (error) {
          if (!(error instanceof ProviderError)) throw error
        }
      }
    }
    expect(values).toBeGreaterThan(500)
  })

  it.each([undefined, () => 1, 1n, Symbol('s')])('does not write %s', value => {
    expect(() => pack(value)).toThrowError(expect.objectContaining({ code: 'misuse' }))
  })
})
