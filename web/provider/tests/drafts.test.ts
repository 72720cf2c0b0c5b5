import { describe, expect, it } from 'vitest'
import { Draft, delta, HINT_INTERVAL_MS, type Hint, wellFormed } from '../src/drafts.js'
import { FakeTime } from './fakes.js'

const typing = (): { time: FakeTime; draft: Draft; sent: Hint[]; line: { up: boolean } } => {
  const time = new FakeTime()
  const sent: Hint[] = []
  const line = { up: true }
  const draft = new Draft(time, hint => {
    if (line.up) sent.push(hint)
    return line.up
  })
  return { time, draft, sent, line }
}

/** What the node makes of hints. */
const heard = (hints: readonly Hint[]): string => {
  let bytes = Buffer.alloc(0)
  for (const { after, keep, text } of hints) {
    bytes =
      after === null ? Buffer.alloc(0) : Buffer.concat([bytes.subarray(0, keep), Buffer.from(text)])
  }
  return bytes.toString()
}

describe('hints', () => {
  it('are deltas, at most ten a second, and the last one always comes', () => {
    const { time, draft, sent } = typing()
    const text = 'Grüße aus 🌍!'
    for (let i = 1; i <= text.length; i++) {
      draft.typing(text.slice(0, i), '')
      time.advance(7)
    }
    time.advance(HINT_INTERVAL_MS)
    expect(heard(sent)).toBe(text)
    expect(sent.length).toBeLessThanOrEqual(Math.ceil((7 * text.length) / HINT_INTERVAL_MS) + 2)
    expect(sent.length).toBeGreaterThan(1)
  })

  it('drop the draft when the field is empty, and not when it was sent', () => {
    const { time, draft, sent } = typing()
    draft.typing('hello', '')
    time.advance(HINT_INTERVAL_MS)
    draft.typing('', '')
    time.advance(HINT_INTERVAL_MS)
    expect(sent.at(-1)).toEqual({ after: null, keep: 0, text: '' })
    draft.typing('again', '')
    time.advance(HINT_INTERVAL_MS)
    draft.submitted()
    time.advance(10 * HINT_INTERVAL_MS)
    expect(sent).toHaveLength(3)
  })

  it('begin anew behind another entry, and on another connection', () => {
    const { time, draft, sent, line } = typing()
    draft.typing('abc', '')
    time.advance(HINT_INTERVAL_MS)
    draft.typing('abcd', '0'.repeat(26))
    time.advance(HINT_INTERVAL_MS)
    expect(sent.at(-1)).toEqual({ after: '0'.repeat(26), keep: 0, text: 'abcd' })
    line.up = false
    draft.typing('abcde', '0'.repeat(26))
    time.advance(HINT_INTERVAL_MS)
    line.up = true
    draft.reconnected()
    expect(sent.at(-1)).toEqual({ after: '0'.repeat(26), keep: 0, text: 'abcde' })
  })

  it('end where a draft grows too long', () => {
    const { time, draft, sent } = typing()
    draft.typing('x', '')
    time.advance(HINT_INTERVAL_MS)
    draft.typing('x'.repeat(70_000), '')
    time.advance(HINT_INTERVAL_MS)
    expect(sent.at(-1)?.after).toBeNull()
  })
})

describe('a delta', () => {
  it.each([
    ['', 'ä', { keep: 0, text: 'ä' }],
    ['äb', 'äc', { keep: 2, text: 'c' }],
    ['🌍', '🌎', { keep: 0, text: '🌎' }], // the same first half of a surrogate pair
    ['a🌍b', 'a🌍', { keep: 5, text: '' }],
    ['abc', 'abc', { keep: 3, text: '' }]
  ])('from %j to %j', (before, now, expected) => {
    expect(delta(before, now)).toEqual(expected)
  })

  it('holds no half characters', () => {
    expect(wellFormed('a\ud83c')).toBe('a\ufffd')
    expect(wellFormed('\ufeffa🌍')).toBe('\ufeffa🌍')
  })
})
