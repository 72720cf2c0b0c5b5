import { describe, expect, it } from 'vitest'
import { type Facts, Tree } from '../src/tree.js'
import { vectors } from './vectors.js'

interface Case {
  entries: {
    id: string
    clock: number
    slot: boolean
    mode: string
    after: string
    place: { parent: string; epoch: number } | null
    ended: boolean
  }[]
  views: Record<string, string[]>
  pending: string[]
  ends: string[]
  admitted: string[]
}

const { cases } = vectors('view.json') as { cases: Case[] }

const facts = (one: Case['entries'][number]): Facts => ({
  id: one.id,
  clock: one.clock,
  slot: one.slot,
  fork: one.mode === 'fork',
  after: one.after,
  parent: one.place?.parent ?? null,
  epoch: one.place?.epoch ?? 0,
  ended: one.ended
})

const check = (tree: Tree, { entries, views, pending, ends, admitted }: Case): void => {
  const seen = Object.fromEntries(Object.keys(views).map(head => [head, tree.view(head)]))
  expect(seen).toEqual(views)
  expect(tree.waiting).toEqual(pending)
  expect([...tree.ends].sort()).toEqual(ends)
  expect(
    entries
      .map(one => one.id)
      .filter(id => tree.isAdmitted(id))
      .sort()
  ).toEqual(admitted)
  expect(tree.clock).toBe(Math.max(0, ...entries.map(one => one.clock)))
}

describe('the view', () => {
  it('reads enough cases to mean something', () => {
    expect(cases.length).toBeGreaterThan(50)
  })

  it.each(cases.map((one, i) => [i, one] as const))('is that of vector %i', (_, one) => {
    const tree = new Tree()
    for (const entry of one.entries) tree.put(facts(entry))
    check(tree, one)
  })

  it('is the same in the opposite order, and after every entry was another before', () => {
    for (const one of cases) {
      const tree = new Tree()
      const reverse = [...one.entries].reverse()
      for (const entry of reverse) {
        tree.put({ ...facts(entry), clock: entry.clock + 1, parent: '', ended: !entry.ended })
      }
      for (const entry of one.entries) tree.put(facts(entry))
      check(tree, one)
    }
  })

  it('forgets an entry as if it had never been', () => {
    for (const one of cases) {
      const tree = new Tree()
      for (const entry of one.entries) tree.put(facts(entry))
      tree.put({ ...facts(one.entries[0] as Case['entries'][number]), id: 'X', clock: 99 })
      tree.drop('X')
      check(tree, one)
    }
  })

  it('does not change its version when nothing it reads changed', () => {
    const tree = new Tree()
    const one = facts((cases[0] as Case).entries[0] as Case['entries'][number])
    expect(tree.put(one)).toBe(true)
    const { version } = tree
    expect(tree.put({ ...one })).toBe(false)
    expect(tree.version).toBe(version)
  })
})
