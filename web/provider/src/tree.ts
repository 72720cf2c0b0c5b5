/**
 * The view: which entries stand in which order, as a pure, total function of the document.
 *
 * This module owns the tree of admitted entries, the order of pending ones, and what a line, a tip
 * and a view are. It must not know Yjs, texts or time: it is fed {@link Facts} about entries and
 * answers the same on every replica, whatever the order in which the facts came. The rules R1 to R8
 * are those of protocol/SCHEMA.md, section 5.
 *
 * What is admitted is kept incrementally, because it only ever grows; what is pending is few and is
 * worked out anew after a change, in (clock, id) order, so that nothing here recurses. A reply that
 * grows changes no facts, and so costs nothing here.
 */

import { ROOT } from './schema.js'

/** What the tree needs to know of one well-formed entry. */
export interface Facts {
  readonly id: string
  readonly clock: number
  readonly slot: boolean
  readonly fork: boolean
  readonly after: string
  /** Of its place; `null` without one. */
  readonly parent: string | null
  readonly epoch: number
  /** An ended state, redacted, or a slot with `stop`. */
  readonly ended: boolean
}

/** What follows from the unplaced entries; worked out whole after a change. */
interface Pending {
  /** Every unplaced entry -> the name of its line. */
  readonly line: Map<string, string>
  readonly base: Map<string, string>
  /** Line -> its pending entries by (clock, id). */
  readonly queue: Map<string, string[]>
  /** Pending entry -> the previous pending entry of its line. */
  readonly before: Map<string, string>
  readonly ends: Set<string>
  /** Those of the ends that are so only because a later slot follows. */
  readonly superseded: Set<string>
}

/** The admitted tree. A line is named by its first entry; the main line by the root. */
class Admitted {
  readonly line = new Map([[ROOT, ROOT]])
  readonly tip = new Map([[ROOT, ROOT]])
  readonly parent = new Map<string, string>()
  /** The child that continues the line. */
  readonly next = new Map<string, string>()
  readonly children = new Map<string, string[]>()
  readonly waiting = new Map<string, Set<string>>()
}

const listed = <K, V>(map: Map<K, V[]>, key: K): V[] => {
  const known = map.get(key)
  if (known !== undefined) return known
  const fresh: V[] = []
  map.set(key, fresh)
  return fresh
}

const by =
  <T>(...keys: readonly ((one: T) => number | string)[]) =>
  (a: T, b: T): number => {
    for (const key of keys) {
      const [left, right] = [key(a), key(b)]
      if (left !== right) return left < right ? -1 : 1
    }
    return 0
  }

const byClock = by<Facts>(
  one => one.clock,
  one => one.id
)
const byEpoch = by<Facts>(
  one => one.epoch,
  one => one.id
)

const same = (a: Facts, b: Facts): boolean =>
  a.clock === b.clock &&
  a.slot === b.slot &&
  a.fork === b.fork &&
  a.after === b.after &&
  a.parent === b.parent &&
  a.epoch === b.epoch &&
  a.ended === b.ended

/**
 * The tree of one conversation's entries. Feed it with {@link put}; every answer is a function of
 * the facts put last for each id, not of their order.
 */
export class Tree {
  private readonly known = new Map<string, Facts>()
  private unplaced = new Set<string>()
  private admitted = new Admitted()
  private pendingPart: Pending | null = null
  private greatest = 0
  /** Grows with every change of an answer; what was computed at the same version still holds. */
  version = 0

  // -- feeding ---------------------------------------------------------------------------------

  /**
   * Learn of an entry, or of a change in its facts; whether that changed anything. O(1), unless an
   * admitted place moved or a clock was set back (only hostile documents do).
   */
  put(facts: Facts): boolean {
    const old = this.known.get(facts.id)
    if (old !== undefined && same(old, facts)) return false
    this.known.set(facts.id, facts)
    this.changed()
    if (facts.clock >= this.greatest) this.greatest = facts.clock
    else if (old?.clock === this.greatest) this.greatest = this.findGreatest()
    if (old !== undefined && old.parent !== null) {
      if (old.parent !== facts.parent || old.epoch !== facts.epoch || old.fork !== facts.fork) {
        this.rebuild()
      }
      return true
    }
    this.unplaced.add(facts.id)
    if (facts.parent !== null) this.admit(facts)
    return true
  }

  /** Forget an entry that became malformed or was deleted (only hostile documents do that). */
  drop(entry: string): boolean {
    if (!this.known.delete(entry)) return false
    this.greatest = this.findGreatest()
    this.rebuild()
    return true
  }

  private changed(): void {
    this.pendingPart = null
    this.version++
  }

  private findGreatest(): number {
    let greatest = 0
    for (const facts of this.known.values()) greatest = Math.max(greatest, facts.clock)
    return greatest
  }

  /** The facts of an entry that is known to be here. */
  private at(entry: string): Facts {
    const facts = this.known.get(entry)
    if (facts === undefined) throw new RangeError(`no entry ${entry}`)
    return facts
  }

  /** Give an entry its place if it leads to the root, then those that waited for it. */
  private admit(first: Facts): void {
    const tree = this.admitted
    const queue = [first]
    for (let facts = queue.pop(); facts !== undefined; facts = queue.pop()) {
      const parent = facts.parent ?? ROOT
      if (!tree.line.has(parent)) {
        const waiting = tree.waiting.get(parent) ?? new Set()
        tree.waiting.set(parent, waiting.add(facts.id))
        continue
      }
      const rival = facts.fork ? undefined : tree.next.get(parent)
      if (rival !== undefined && byEpoch(facts, this.at(rival)) < 0) {
        // It continues the line in place of one that we already followed: everything behind the
        // rival changes its line. Two nodes at once; rare enough to start over.
        this.rebuild()
        return
      }
      this.place(facts, parent, !facts.fork && rival === undefined)
      for (const child of tree.waiting.get(facts.id) ?? []) queue.push(this.at(child))
      tree.waiting.delete(facts.id)
    }
  }

  private place(facts: Facts, parent: string, continues: boolean): void {
    const tree = this.admitted
    const line = continues ? (tree.line.get(parent) ?? ROOT) : facts.id
    tree.line.set(facts.id, line)
    tree.tip.set(line, facts.id)
    tree.parent.set(facts.id, parent)
    listed(tree.children, parent).push(facts.id)
    if (continues) tree.next.set(parent, facts.id)
    this.unplaced.delete(facts.id)
  }

  /** Rebuild with siblings in (epoch, id) order, so that no rival appears on the way. */
  private rebuild(): void {
    this.admitted = new Admitted()
    this.changed()
    this.unplaced = new Set(this.known.keys())
    const children = new Map<string, Facts[]>()
    for (const facts of [...this.known.values()].sort(byEpoch)) {
      if (facts.parent !== null) listed(children, facts.parent).push(facts)
    }
    const queue = [ROOT]
    for (let parent = queue.pop(); parent !== undefined; parent = queue.pop()) {
      for (const facts of children.get(parent) ?? []) {
        this.place(facts, parent, !facts.fork && !this.admitted.next.has(parent))
        queue.push(facts.id)
      }
      children.delete(parent)
    }
    for (const [parent, orphans] of children) {
      this.admitted.waiting.set(parent, new Set(orphans.map(facts => facts.id)))
    }
  }

  // -- the pending part ------------------------------------------------------------------------

  /** R2. */
  private after(facts: Facts): string {
    const named = this.known.get(facts.after)
    return named !== undefined && named.clock < facts.clock ? named.id : ROOT
  }

  private get pending(): Pending {
    this.pendingPart ??= this.workOut()
    return this.pendingPart
  }

  private workOut(): Pending {
    const order = [...this.unplaced].map(entry => this.at(entry)).sort(byClock)
    const line = new Map<string, string>()
    const queue = new Map<string, string[]>()
    const ends = new Set<string>()
    for (const facts of order) {
      // R6; `after` has a smaller clock, so its line is known already.
      const ended = facts.ended || facts.parent !== null // R1: a place that does not count
      const after = this.after(facts)
      const named = this.admitted.line.get(after) ?? line.get(after) ?? ROOT
      const own = facts.fork && !ended ? facts.id : named
      line.set(facts.id, own)
      if (ended) ends.add(facts.id)
      else listed(queue, own).push(facts.id)
    }
    const superseded = new Set<string>()
    for (const entries of queue.values()) {
      // R3
      const slots = entries.filter(entry => this.at(entry).slot)
      for (const entry of slots.slice(0, -1)) if (!this.at(entry).fork) superseded.add(entry)
    }
    for (const entry of superseded) ends.add(entry)
    const base = new Map<string, string>()
    for (const facts of order) {
      // R4
      const after = this.after(facts)
      base.set(facts.id, ends.has(after) ? (base.get(after) ?? ROOT) : after)
    }
    const before = new Map<string, string>()
    for (const [name, entries] of queue) {
      const kept = entries.filter(entry => !superseded.has(entry))
      queue.set(name, kept)
      kept.slice(1).forEach((entry, i) => {
        before.set(entry, kept[i] ?? ROOT)
      })
    }
    return { line, base, queue, before, ends, superseded }
  }

  // -- answers ---------------------------------------------------------------------------------

  /** Whether there is such an entry. */
  has(entry: string): boolean {
    return this.known.has(entry)
  }

  /** How many entries there are. */
  get size(): number {
    return this.known.size
  }

  /** All entries known, in no particular order. */
  get entries(): IterableIterator<string> {
    return this.known.keys()
  }

  /** What was put last for an entry. */
  facts(entry: string): Facts | undefined {
    return this.known.get(entry)
  }

  /** The greatest clock of any entry; 0 in an empty conversation. */
  get clock(): number {
    return this.greatest
  }

  /** Whether an entry has a place that counts; the root always has. */
  isAdmitted(entry: string): boolean {
    return this.admitted.line.has(entry)
  }

  /** Whether an entry is an unplaced end (R3). */
  isEnd(entry: string): boolean {
    return this.pending.ends.has(entry)
  }

  /** Whether a pending slot was taken over by a later one of its line. */
  isSuperseded(entry: string): boolean {
    return this.pending.superseded.has(entry)
  }

  /** The pending entries, by (clock, id). Unplaced ends are not among them. */
  get waiting(): string[] {
    return [...this.pending.queue.values()]
      .flat()
      .map(entry => this.at(entry))
      .sort(byClock)
      .map(facts => facts.id)
  }

  /** The unplaced ends, in no particular order. */
  get ends(): ReadonlySet<string> {
    return this.pending.ends
  }

  /** R7: what stands before an entry in its path. An unplaced end hangs at its base. */
  up(entry: string): string {
    const parent = this.admitted.parent.get(entry)
    if (parent !== undefined) return parent
    const { ends, base, before, line } = this.pending
    if (ends.has(entry) || this.at(entry).fork) return base.get(entry) ?? ROOT
    // A continue entry of a pending fork's line always has that fork before it, so without one the
    // line is an admitted one.
    return before.get(entry) ?? this.admitted.tip.get(line.get(entry) ?? ROOT) ?? ROOT
  }

  /** The name of the line that an entry lies on (R5, R6); the root's for an unknown entry. */
  line(entry: string): string {
    return this.admitted.line.get(entry) ?? this.pending.line.get(entry) ?? ROOT
  }

  /** The last entry, pending ones included, of the line that an entry lies on. */
  last(entry: string): string {
    const line = this.line(entry)
    return this.pending.queue.get(line)?.at(-1) ?? this.admitted.tip.get(line) ?? ROOT
  }

  /** The `up` chain of an entry from the first one to itself; empty for the root. */
  path(entry: string): string[] {
    const chain: string[] = []
    for (let one = entry; one !== ROOT; one = this.up(one)) chain.push(one)
    return chain.reverse()
  }

  /** R8: what a reader sees, in order. */
  view(head: string = ROOT): string[] {
    return this.path(this.last(head))
  }

  /**
   * The entries that stand directly behind one: admitted by (epoch, id), then the others by
   * (clock, id). Unplaced ends are listed behind their base, so that a stopped request stays
   * findable.
   */
  children(entry: string): string[] {
    const admitted = (this.admitted.children.get(entry) ?? []).map(one => this.at(one))
    const others = [...this.unplaced].filter(one => this.up(one) === entry).map(one => this.at(one))
    return [...admitted.sort(byEpoch), ...others.sort(byClock)].map(facts => facts.id)
  }

  /** The last entry of every line, the main line's first, then by name of the line. */
  tips(): string[] {
    const names = new Set(this.admitted.tip.keys())
    for (const [line, queue] of this.pending.queue) if (queue.length > 0) names.add(line)
    return [...names]
      .sort()
      .map(name => this.last(name))
      .filter(last => last !== ROOT)
  }
}
