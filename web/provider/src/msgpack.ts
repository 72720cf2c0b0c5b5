/**
 * MessagePack, the part of it that frames and digests use: nil, booleans, whole numbers, float64,
 * texts, bytes, lists and maps with texts as keys.
 *
 * This module owns the bytes of values. It must not know what any value means. It is strict where
 * general libraries are lenient, because every implementation must take and refuse the same bytes:
 * UTF-8 is checked, nothing may follow the value, extension types do not exist, and a number with a
 * point is told apart from a whole one ({@link Fraction}).
 *
 * Source: https://github.com/msgpack/msgpack/blob/master/spec.md
 */

import { malformed, misuse } from './errors.js'

/** How deep values nest: a request's values nest 8 deep, in a frame that is a list. */
const NESTING_MAX = 16

const encoder = new TextEncoder()
const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** A float as it was read: `7.0` is not the whole number 7 on the wire. */
export class Fraction {
  constructor(readonly value: number) {}
}

// -- writing -----------------------------------------------------------------------------------

class Writer {
  private buffer = new Uint8Array(256)
  private view = new DataView(this.buffer.buffer)
  private length = 0

  bytes(): Uint8Array {
    return this.buffer.slice(0, this.length)
  }

  value(value: unknown, depth: number): void {
    if (depth > NESTING_MAX) throw misuse(`values nest at most ${NESTING_MAX} deep`)
    switch (typeof value) {
      case 'boolean':
        return this.number(1, value ? 0xc3 : 0xc2)
      case 'number':
        return Number.isSafeInteger(value) ? this.whole(value) : this.fraction(value)
      case 'string':
        return this.text(value)
      case 'object':
        return this.object(value, depth)
      default:
        throw misuse(`a ${typeof value} is no plain value`)
    }
  }

  private object(value: object | null, depth: number): void {
    if (value === null) {
      this.number(1, 0xc0)
    } else if (value instanceof Uint8Array) {
      this.head(value.length, null, [0xc4, 0xc5, 0xc6])
      this.raw(value)
    } else if (Array.isArray(value)) {
      this.head(value.length, [0x90, 15], [null, 0xdc, 0xdd])
      for (const item of value) this.value(item, depth + 1)
    } else {
      const pairs = Object.entries(value).filter(([, item]) => item !== undefined)
      this.head(pairs.length, [0x80, 15], [null, 0xde, 0xdf])
      for (const [key, item] of pairs) {
        this.text(key)
        this.value(item, depth + 1)
      }
    }
  }

  private text(value: string): void {
    const utf8 = encoder.encode(value)
    this.head(utf8.length, [0xa0, 31], [0xd9, 0xda, 0xdb])
    this.raw(utf8)
  }

  /** The shortest head for a length: in the tag itself, or in 1, 2 or 4 bytes behind one. */
  private head(
    length: number,
    short: readonly [number, number] | null,
    tags: readonly [number | null, number, number]
  ): void {
    if (short !== null && length <= short[1]) return this.number(1, short[0] | length)
    if (tags[0] !== null && length <= 0xff) {
      this.number(1, tags[0])
      return this.number(1, length)
    }
    const wide = length > 0xffff
    this.number(1, wide ? tags[2] : tags[1])
    this.number(wide ? 4 : 2, length)
  }

  private whole(value: number): void {
    if (value >= 0) {
      if (value <= 0x7f) return this.number(1, value)
      const step = value <= 0xff ? 0 : value <= 0xffff ? 1 : value <= 0xffffffff ? 2 : 3
      this.number(1, 0xcc + step)
      return step === 3 ? this.wide(value) : this.number(1 << step, value)
    }
    if (value >= -0x20) return this.number(1, value & 0xff)
    const step = value >= -0x80 ? 0 : value >= -0x8000 ? 1 : value >= -0x80000000 ? 2 : 3
    this.number(1, 0xd0 + step)
    return step === 3 ? this.wide(value) : this.number(1 << step, value)
  }

  private wide(value: number): void {
    this.reserve(8)
    this.view.setBigInt64(this.length, BigInt(value))
    this.length += 8
  }

  private fraction(value: number): void {
    this.number(1, 0xcb)
    this.reserve(8)
    this.view.setFloat64(this.length, value)
    this.length += 8
  }

  private number(width: number, value: number): void {
    this.reserve(width)
    if (width === 1) this.view.setUint8(this.length, value)
    else if (width === 2) this.view.setUint16(this.length, value)
    else this.view.setUint32(this.length, value)
    this.length += width
  }

  private raw(value: Uint8Array): void {
    this.reserve(value.length)
    this.buffer.set(value, this.length)
    this.length += value.length
  }

  private reserve(more: number): void {
    if (this.length + more <= this.buffer.length) return
    const larger = new Uint8Array(Math.max(2 * this.buffer.length, this.length + more))
    larger.set(this.buffer)
    this.buffer = larger
    this.view = new DataView(larger.buffer)
  }
}

/**
 * The shortest bytes of a plain value. Keys of maps keep their order; those that are `undefined`
 * are left out.
 *
 * @throws ProviderError `misuse` for what is no plain value.
 */
export const pack = (value: unknown): Uint8Array => {
  const writer = new Writer()
  writer.value(value, 0)
  return writer.bytes()
}

// -- reading -----------------------------------------------------------------------------------

class Reader {
  private at = 0
  private readonly view: DataView

  constructor(private readonly source: Uint8Array) {
    this.view = new DataView(source.buffer, source.byteOffset, source.byteLength)
  }

  end(): void {
    if (this.at !== this.source.length) throw malformed('bytes follow the value')
  }

  value(depth: number): unknown {
    if (depth > NESTING_MAX) throw malformed(`values nest at most ${NESTING_MAX} deep`)
    const tag = this.number(1)
    if (tag <= 0x7f) return tag
    if (tag >= 0xe0) return tag - 0x100
    if (tag <= 0x8f) return this.map(tag & 0x0f, depth)
    if (tag <= 0x9f) return this.list(tag & 0x0f, depth)
    if (tag <= 0xbf) return this.text(tag & 0x1f)
    return this.tagged(tag, depth)
  }

  private tagged(tag: number, depth: number): unknown {
    switch (tag) {
      case 0xc0:
        return null
      case 0xc2:
        return false
      case 0xc3:
        return true
      case 0xc4:
      case 0xc5:
      case 0xc6:
        return this.raw(this.number(1 << (tag - 0xc4))).slice()
      case 0xca:
        return new Fraction(this.view.getFloat32(this.take(4)))
      case 0xcb:
        return new Fraction(this.view.getFloat64(this.take(8)))
      case 0xcc:
      case 0xcd:
      case 0xce:
        return this.number(1 << (tag - 0xcc))
      case 0xcf:
        return safe(this.view.getBigUint64(this.take(8)))
      case 0xd0:
        return this.view.getInt8(this.take(1))
      case 0xd1:
        return this.view.getInt16(this.take(2))
      case 0xd2:
        return this.view.getInt32(this.take(4))
      case 0xd3:
        return safe(this.view.getBigInt64(this.take(8)))
      case 0xd9:
      case 0xda:
      case 0xdb:
        return this.text(this.number(1 << (tag - 0xd9)))
      case 0xdc:
      case 0xdd:
        return this.list(this.number(tag === 0xdc ? 2 : 4), depth)
      case 0xde:
      case 0xdf:
        return this.map(this.number(tag === 0xde ? 2 : 4), depth)
      default:
        throw malformed('that kind of value is not used')
    }
  }

  private list(length: number, depth: number): unknown[] {
    if (length > this.source.length - this.at) throw malformed('a list is cut')
    const items: unknown[] = []
    for (let i = 0; i < length; i++) items.push(this.value(depth + 1))
    return items
  }

  private map(length: number, depth: number): Record<string, unknown> {
    if (2 * length > this.source.length - this.at) throw malformed('a map is cut')
    const pairs: [string, unknown][] = []
    for (let i = 0; i < length; i++) {
      const key = this.value(depth + 1)
      if (typeof key !== 'string') throw malformed('names are text')
      pairs.push([key, this.value(depth + 1)])
    }
    return Object.fromEntries(pairs) // defines keys, so that `__proto__` is one like any other
  }

  private text(length: number): string {
    try {
      return decoder.decode(this.raw(length))
    } catch (error) {
      if (error instanceof TypeError) throw malformed('text is not valid UTF-8')
      throw error
    }
  }

  private raw(length: number): Uint8Array {
    const from = this.take(length)
    return this.source.subarray(from, from + length)
  }

  private number(width: number): number {
    const from = this.take(width)
    if (width === 1) return this.view.getUint8(from)
    return width === 2 ? this.view.getUint16(from) : this.view.getUint32(from)
  }

  private take(length: number): number {
    const from = this.at
    if (length > this.source.length - from) throw malformed('a value is cut')
    this.at += length
    return from
  }
}

/** Whole numbers beyond what JavaScript counts exactly stay `bigint`, and no form takes them. */
const safe = (value: bigint): number | bigint => {
  const number = Number(value)
  return Number.isSafeInteger(number) ? number : value
}

/**
 * The value that bytes stand for. Floats come as {@link Fraction}, whole numbers beyond ±(2^53 - 1)
 * as `bigint`, bytes as a copy.
 *
 * @throws ProviderError `malformed` for anything else than exactly one value.
 */
export const unpack = (bytes: Uint8Array): unknown => {
  const reader = new Reader(bytes)
  const value = reader.value(0)
  reader.end()
  return value
}
