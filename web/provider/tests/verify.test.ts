import { describe, expect, it } from 'vitest'
import { Document } from '../src/document.js'
import { canonical, nobleCheck, signatureCheck, verifyPath } from '../src/verify.js'
import { hex, unhex, vectors } from './vectors.js'

interface Case {
  readonly about: string
  readonly document: string
  readonly path: string[]
  readonly holds: [string, boolean][]
  readonly digests: string[]
}

const chain = vectors('chain.json') as { conversation: string; relay: string; cases: Case[] }
const relay = unhex(chain.relay)

const documentOf = (update: string): Document => {
  const document = new Document(99)
  document.apply(unhex(update))
  return document
}

describe.each([
  ["the browser's own Ed25519", signatureCheck],
  ["the noble project's", nobleCheck]
])('the chain, by %s', (_, check) => {
  it.each(chain.cases)('$about', async ({ document, path, holds, digests }) => {
    const replica = documentOf(document)
    const verdicts = await verifyPath(replica, chain.conversation, path, relay, await check())
    expect(verdicts.map(({ entry, problem }) => [entry, problem === null])).toEqual(holds)
    expect(path.flatMap(id => replica.entry(id, false)?.proof?.digest ?? []).map(hex)).toEqual(
      digests
    )
  })
})

it('does not ask for the signature of leases without a pinned key', async () => {
  const unsigned = chain.cases.find(one => one.about.includes('did not sign'))
  const replica = documentOf(unsigned?.document ?? '')
  const verdicts = await verifyPath(replica, chain.conversation, unsigned?.path ?? [], null)
  expect(verdicts.map(({ problem }) => problem)).toEqual([null, null, null])
})

it('stops at a reply that is still streaming', async () => {
  const [one] = chain.cases
  const replica = documentOf(one?.document ?? '')
  const [first] = await verifyPath(replica, chain.conversation, one?.path ?? [], relay)
  expect(first?.digest).toBeInstanceOf(Uint8Array)
  expect(await verifyPath(new Document(99), chain.conversation, one?.path ?? [], relay)).toEqual([])
})

it('sorts keys by code point, not by code unit', () => {
  expect(canonical({ '\u{1f30d}': 2, '\ue000': 1, a: [{ b: undefined, aa: 1n }] })).toEqual([
    [
      'a',
      [
        [
          ['aa', 1],
          ['b', null]
        ]
      ]
    ],
    ['\ue000', 1],
    ['\u{1f30d}', 2]
  ])
})
