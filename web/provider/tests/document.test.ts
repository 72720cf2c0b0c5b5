import { describe, expect, it } from 'vitest'
import * as Y from 'yjs'
import { compacted, Document, type Intent, lacking, type Touched } from '../src/document.js'
import { conversationId, entryId, isEntryId, type Random, ROOT } from '../src/schema.js'
import { encodeStateVector } from '../src/state-vector.js'
import { hex, unhex, vectors } from './vectors.js'

interface Documents {
  births: { owner: string; nonce: string; id: string }[]
  owner: string
  conversation: string
  ids: { question: string; slot: string }
  steps: { name: string; update: string }[]
  document: string
}

const made = vectors('documents.json') as Documents
const AUTHOR = { principal: 'olga', device: 'phone' }
const zeros: Random = bytes => bytes.fill(0)
const id = (n: number): string => entryId(n, zeros)

const said = (n: number, more: Partial<Intent & { kind: 'entry' }> = {}): Intent => ({
  kind: 'entry',
  id: id(n),
  role: 'user',
  text: `text ${n}`,
  call: null,
  after: n === 0 ? ROOT : id(n - 1),
  fork: false,
  at: 5,
  slot: null,
  head: false,
  ...more
})

describe('a conversation that real Yjs wrote', () => {
  it.each(made.births)('has the id $id', ({ owner, nonce, id: expected }) => {
    expect(conversationId(owner, unhex(nonce))).toBe(expected)
  })

  it('reads as it was meant, step by step and at once', () => {
    const [steps, whole] = [new Document(1), new Document(2)]
    const { question, slot } = made.ids
    for (const { name, update } of made.steps) {
      steps.apply(unhex(update))
      if (name === 'a question and its slot') expect(steps.tree.view()).toEqual([question, slot])
    }
    whole.apply(unhex(made.document))
    expect(steps.meta).toEqual(whole.meta)
    expect(whole.meta).toMatchObject({ title: 'Grüße 🌍', createdAt: 1_700_000_000_000 })
    expect([steps, whole].map(one => one.tree.view())).toEqual([[], []]) // withdrawn, and stopped
    expect(steps.entry(slot, false)).toEqual(whole.entry(slot, false))
    expect(whole.entry(slot, false)?.born.params).toMatchObject({ seed: 2 ** 53 - 1, stop: ['\n'] })
    expect(whole.entry(question, false)).toMatchObject({ standing: 'redacted', content: '' })
    expect([made.owner, 'will', 'eve'].map(one => steps.grantOf(one))).toEqual([
      'owner',
      'writer',
      null
    ])
  })
})

describe('reading', () => {
  it('is lenient: what is malformed counts as absent', () => {
    const doc = new Y.Doc()
    const meta = doc.getMap('meta')
    meta.set('title', 'x'.repeat(501))
    meta.set('head', 7)
    meta.set('policy', { reply: 'auto', overflow: 'explode' })
    meta.set('birth', { owner: 'o', nonce: new Uint8Array(15) })
    doc.getMap('access').set('ann', 'god')
    doc.getMap('access').set('bob', 'reader')
    const entries = doc.getMap('entries')
    const entry = (fields: [string, unknown][]): Y.Map<unknown> => new Y.Map(fields)
    entries.set('not-an-id', entry([['born', { role: 'user', clock: 1 }]]))
    entries.set(id(1), entry([['born', { role: 'god', clock: 1 }]]))
    entries.set(id(2), entry([['born', { role: 'user', clock: 1.5 }]]))
    entries.set(id(3), 'text')
    entries.set(
      id(4),
      entry([
        [
          'born',
          {
            role: 'assistant',
            clock: 7n,
            mode: 'sideways',
            after: 3,
            params: { top_p: 2, seed: 1 }
          }
        ],
        ['content', new Y.Text('so far')],
        ['state', 'flying'],
        ['redacted', new Y.Map()],
        ['usage', { prompt: 4, prefilled: 1, error: { code: 'c' } }]
      ])
    )
    const document = new Document(1)
    document.apply(Y.encodeStateAsUpdate(doc))
    expect(document.meta).toEqual({
      title: '',
      createdAt: null,
      head: '',
      model: null,
      policy: { reply: 'auto', on_new_entry: 'queue', overflow: 'refuse', reasoning: 'hidden' },
      owner: null
    })
    expect([...document.access()]).toEqual([['bob', 'reader']])
    expect([...document.tree.entries]).toEqual([id(4)])
    expect(document.entry(id(4), false)).toMatchObject({
      content: 'so far',
      state: null,
      standing: 'pending',
      redacted: null,
      born: { clock: 7, fork: false, after: '', params: { seed: 1 } },
      usage: { reused: 3, sampled: 0, error: { code: 'c', message: '' } }
    })
    expect(document.entry(id(4), false)?.born.params).toEqual({ seed: 1 })
  })

  it('gives the same object until the entry changes, and only then tells of it', () => {
    const told: Touched[] = []
    const document = new Document(1, touched => told.push(touched))
    document.compose(said(0), AUTHOR)
    document.compose(said(1), AUTHOR)
    const [first, second] = [document.entry(id(0), false), document.entry(id(1), false)]
    document.compose({ kind: 'redact', entry: id(1), at: 1 }, AUTHOR)
    expect(document.entry(id(0), false)).toBe(first)
    expect(document.entry(id(1), false)).not.toBe(second)
    expect(told.at(-1)).toMatchObject({
      entries: new Set([id(1)]),
      structure: true,
      withdrawn: true
    })
    expect(document.entry(id(0), true)).toMatchObject({ ...first, standing: 'unsent' })
  })

  it('does not touch the tree while a reply grows', () => {
    const remote = new Y.Doc()
    const text = new Y.Text('')
    remote.getMap('entries').set(
      id(1),
      new Y.Map<unknown>([
        ['born', { role: 'assistant', clock: 1 }],
        ['content', text],
        ['place', { parent: '', epoch: 1 }],
        ['state', 'streaming']
      ])
    )
    const told: Touched[] = []
    const document = new Document(1, touched => told.push(touched))
    document.apply(Y.encodeStateAsUpdate(remote))
    const { version } = document.tree
    remote.on('update', (update: Uint8Array) => document.apply(update))
    for (const word of ['one', ' two', ' three']) text.insert(text.length, word)
    expect(document.tree.version).toBe(version)
    expect(document.entry(id(1), false)).toMatchObject({
      content: 'one two three',
      standing: 'streaming'
    })
    expect(told).toHaveLength(4)
    expect(told.at(-1)).toMatchObject({ entries: new Set([id(1)]), structure: false, meta: false })
  })
})

describe('composing', () => {
  it('makes one update of an entry and its slot, with plain values', () => {
    const document = new Document(1)
    document.compose(said(0), AUTHOR)
    const update = document.compose(
      said(1, { slot: { id: id(2), params: { max_tokens: 3, extend: false } } }),
      AUTHOR
    )
    const other = new Document(2)
    other.apply(compacted([document.diff()]))
    expect(other.bornPlain(id(0))).toEqual({
      role: 'user',
      author: 'olga',
      device: 'phone',
      at: 5,
      clock: 1,
      mode: 'continue'
    })
    expect(other.bornPlain(id(2))).toEqual({
      role: 'assistant',
      author: 'olga',
      device: 'phone',
      at: 5,
      clock: 3,
      mode: 'continue',
      after: id(1),
      params: { max_tokens: 3 }
    })
    expect(update?.length).toBeLessThan(500)
  })

  it('says nothing twice', () => {
    const document = new Document(1)
    const create: Intent = {
      kind: 'create',
      owner: 'olga',
      nonce: new Uint8Array(16),
      at: 1,
      title: 't',
      model: null,
      policy: null
    }
    expect(document.compose(create, AUTHOR)).not.toBeNull()
    expect(document.compose(create, AUTHOR)).toBeNull()
    expect(document.compose(said(0), AUTHOR)).not.toBeNull()
    expect(document.compose(said(0), AUTHOR)).toBeNull()
    expect(document.compose({ kind: 'stop', slot: id(0) }, AUTHOR)).toBeNull() // no slot
    expect(document.compose({ kind: 'stop', slot: id(9) }, AUTHOR)).toBeNull()
    expect(document.compose({ kind: 'redact', entry: id(9), at: 1 }, AUTHOR)).toBeNull()
    expect(document.compose({ kind: 'access', principal: 'ann', grant: null }, AUTHOR)).toBeNull()
    expect(document.compose({ kind: 'meta', key: 'model', value: null }, AUTHOR)).toBeNull()
  })

  it('writes at the end of the line what was written after something that never came', () => {
    const document = new Document(1)
    document.compose(said(0), AUTHOR)
    document.compose(document.resolve(said(5, { after: id(4), fork: true })), AUTHOR)
    expect(document.born(id(5))).toMatchObject({ after: id(0), fork: false, clock: 2 })
  })

  it('really takes the text away when it withdraws an entry', () => {
    const document = new Document(1)
    document.compose(said(0, { text: 'a secret' }), AUTHOR)
    const before = document.diff()
    const withdrawal = document.compose({ kind: 'redact', entry: id(0), at: 1 }, AUTHOR)
    const bytes = Buffer.from(compacted([before, withdrawal ?? before]))
    expect(Buffer.from(before).includes('a secret')).toBe(true)
    expect(bytes.includes('a secret')).toBe(false)
    expect(hex(lacking([before], encodeStateVector(document.stateVector())))).toBe('0000')
  })
})

describe('ids', () => {
  it('begin with their time, and have the canonical form', () => {
    expect(entryId(0, zeros)).toBe('0'.repeat(26))
    expect(entryId(2 ** 48 - 1, bytes => bytes.fill(255))).toBe('7ZZZZZZZZZZZZZZZZZZZZZZZZZ')
    expect(entryId(1, zeros) > entryId(0, bytes => bytes.fill(255))).toBe(true)
    for (const wrong of [
      '8'.padEnd(26, '0'),
      '0'.repeat(25),
      `${'0'.repeat(25)}I`,
      `${id(1)}\n`,
      1
    ]) {
      expect(isEntryId(wrong)).toBe(false)
    }
  })
})
