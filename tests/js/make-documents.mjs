/*
 * Makes protocol/vectors/documents.json: a conversation as a stranger writes it with real Yjs and
 * nothing but protocol/SCHEMA.md in hand, update by update, and what a reader must find in it; and
 * conversation ids. Client ids and contents are fixed, so that making it twice gives equal files.
 *
 * Run with `node make-documents.mjs` after a change here.
 */

import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import * as Y from 'yjs'

export const documentsFile = new URL('../../protocol/vectors/documents.json', import.meta.url)

const hex = (bytes) => Buffer.from(bytes).toString('hex')

/** The id that a birth stands for. */
export const conversationId = (owner, nonce) =>
  createHash('sha256').update(owner, 'utf8').update(nonce).digest('base64url').slice(0, 22)

const nonce = Uint8Array.from({ length: 16 }, (_, index) => index * 16)
const owner = 'Zoë'
const ids = { question: '01J0000000000000000000000A', slot: '01J0000000000000000000000B' }

const document = () => {
  const doc = new Y.Doc()
  doc.clientID = 4_294_967_295
  const [meta, access, entries] = ['meta', 'access', 'entries'].map((name) => doc.getMap(name))
  const steps = []
  const step = (name, write) => {
    let update
    doc.once('update', (bytes) => { update = bytes })
    doc.transact(write)
    steps.push({ name, update: hex(update) })
  }
  step('birth', () => {
    meta.set('schema', 1)
    meta.set('birth', { owner, nonce })
    meta.set('title', 'Grüße 🌍')
    meta.set('created_at', 1_700_000_000_000)
    meta.set('policy', { reply: 'ask', overflow: 'drop_oldest' })
  })
  step('a right', () => access.set('will', 'writer'))
  step('a question and its slot', () => {
    const question = new Y.Map()
    question.set('born', {
      role: 'user', author: owner, device: 'a browser', at: 1_700_000_000_001, clock: 1,
      mode: 'continue',
    })
    question.set('content', 'What is 6 · 7? 🤔')
    entries.set(ids.question, question)
    const slot = new Y.Map()
    slot.set('born', {
      role: 'assistant', author: owner, device: 'a browser', at: 1_700_000_000_001, clock: 2,
      mode: 'continue', after: ids.question,
      params: { max_tokens: 64, temperature: 0.7, top_p: 1, seed: 9_007_199_254_740_991, stop: ['\n'] },
    })
    entries.set(ids.slot, slot)
  })
  step('a stop', () => entries.get(ids.slot).set('stop', owner))
  step('a withdrawal', () => {
    const question = entries.get(ids.question)
    question.set('redacted', { by: owner, at: 1_700_000_000_002 })
    question.delete('content')
  })
  return { owner, conversation: conversationId(owner, nonce), ids, steps, document: hex(Y.encodeStateAsUpdate(doc)) }
}

export const vectors = () => ({
  about:
    'A conversation written by real Yjs under the schema of SCHEMA.md, one update a step, all by its ' +
    'owner; `document` is all of them as one. `births` are conversation ids: the first 22 characters ' +
    'of base64url(SHA-256(UTF-8 of the owner, nonce)).',
  births: [[owner, nonce], ['owner', new Uint8Array(16)], ['a', new Uint8Array(16).fill(255)]].map(
    ([name, bytes]) => ({ owner: name, nonce: hex(bytes), id: conversationId(name, bytes) })),
  ...document()
})

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  writeFileSync(documentsFile, JSON.stringify(vectors(), null, 2) + '\n')
}
