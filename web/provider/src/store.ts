/**
 * What a device keeps: replicas, unsent writes, refused writes, and who we are.
 *
 * This module owns the form of what is kept, and keeping it in memory. It must not know Yjs (merging
 * updates is an argument), sockets, or what a write means. `indexeddb.ts` keeps the same on disk.
 *
 * Acknowledged updates and the outbox are kept apart, because a refused write must be taken out
 * again. Several tabs share a store: what they acknowledge is one, each has an outbox of its own.
 */

import type { Grant } from './api.js'
import type { Intent } from './document.js'

/** A write that is not acknowledged yet. */
export interface Row {
  /** Unique. */
  readonly id: string
  /** Whose outbox it is in. */
  readonly tab: string
  /** Rows are sent in this order. */
  readonly order: number
  readonly intent: Intent
  readonly update: Uint8Array
}

/** A write that was refused for good. */
export interface RefusedRow {
  readonly id: string
  readonly intent: Intent
  readonly code: string
  readonly rule: string
  readonly reason: string
  readonly at: number
}

/** Up to where in which log of the relay everything is kept here. */
export interface Cursor {
  readonly log: string
  readonly lsn: number
}

/** All that is kept of a conversation. */
export interface Kept {
  /** What is acknowledged, in the order in which it came. */
  readonly updates: readonly Uint8Array[]
  readonly cursor: Cursor | null
  readonly outbox: readonly Row[]
  readonly refused: readonly RefusedRow[]
}

/** One step of a write; the steps of one write happen together or not at all. */
export type Step =
  /**
   * Acknowledged updates. With a cursor they reach up to it, and are left out if another tab kept
   * them already.
   */
  | { readonly step: 'append'; readonly update: Uint8Array; readonly cursor: Cursor | null }
  | { readonly step: 'put'; readonly row: Row }
  | { readonly step: 'drop'; readonly row: string }
  | { readonly step: 'refuse'; readonly refused: RefusedRow }
  | { readonly step: 'discard'; readonly refused: string }

/** A line of the list of conversations. */
export interface Facts {
  readonly title: string
  readonly role: Grant | null
  readonly owner: string
  readonly created_at: number
  readonly changed_at: number
  readonly archived: boolean
}

/** What is kept beside the conversations. */
export interface Profile {
  readonly principal: string | null
  /** The relay's public key, pinned at the first connection. */
  readonly relay: Uint8Array | null
  /** What the relay listed last. */
  readonly listed: ReadonlyMap<string, Facts>
  /** Conversations that were made here and that the relay has not listed yet. */
  readonly local: ReadonlyMap<string, Facts>
}

/** The profile of a device that was never connected. */
export const NO_PROFILE: Profile = {
  principal: null,
  relay: null,
  listed: new Map(),
  local: new Map()
}

/**
 * Where everything is kept. Writes happen in the order in which they were called, each as a whole,
 * and are durable when the promise resolves; it rejects with `ProviderError` (`store`).
 */
export interface Store {
  profile(): Promise<Profile>
  saveProfile(profile: Profile): Promise<void>
  load(conversation: string): Promise<Kept>
  write(conversation: string, steps: readonly Step[]): Promise<void>
  /** Put one update in the place of all that are there, others' included. */
  compact(
    conversation: string,
    merge: (updates: readonly Uint8Array[]) => Uint8Array
  ): Promise<void>
  /** Make the rows of tabs that are gone those of `tab`; answers which it took. */
  adopt(conversation: string, gone: readonly string[], tab: string): Promise<readonly Row[]>
  /** The conversations that have something unsent. */
  waiting(): Promise<readonly string[]>
  forget(conversation: string): Promise<void>
  close(): Promise<void>
}

/** Whether updates up to `cursor` are covered by what is kept up to `kept`. */
export const isKept = (kept: Cursor | null, cursor: Cursor | null): boolean =>
  kept !== null && cursor !== null && kept.log === cursor.log && cursor.lsn <= kept.lsn

interface Shelf {
  updates: Uint8Array[]
  cursor: Cursor | null
  outbox: Map<string, Row>
  refused: Map<string, RefusedRow>
}

/** Keeps everything in memory: for tests, for Node, and where there is no IndexedDB. */
export class MemoryStore implements Store {
  private readonly shelves = new Map<string, Shelf>()
  private kept: Profile = NO_PROFILE

  async profile(): Promise<Profile> {
    return this.kept
  }

  async saveProfile(profile: Profile): Promise<void> {
    this.kept = structuredClone(profile)
  }

  async load(conversation: string): Promise<Kept> {
    const { updates, cursor, outbox, refused } = this.shelf(conversation)
    return {
      updates: [...updates],
      cursor,
      outbox: [...outbox.values()].sort((a, b) => a.order - b.order),
      refused: [...refused.values()]
    }
  }

  async write(conversation: string, steps: readonly Step[]): Promise<void> {
    const shelf = this.shelf(conversation)
    for (const one of structuredClone(steps)) {
      switch (one.step) {
        case 'append':
          if (isKept(shelf.cursor, one.cursor)) break
          shelf.updates.push(one.update)
          shelf.cursor = one.cursor ?? shelf.cursor
          break
        case 'put':
          shelf.outbox.set(one.row.id, one.row)
          break
        case 'drop':
          shelf.outbox.delete(one.row)
          break
        case 'refuse':
          shelf.refused.set(one.refused.id, one.refused)
          break
        case 'discard':
          shelf.refused.delete(one.refused)
      }
    }
  }

  async compact(
    conversation: string,
    merge: (updates: readonly Uint8Array[]) => Uint8Array
  ): Promise<void> {
    const shelf = this.shelf(conversation)
    shelf.updates = [merge(shelf.updates)]
  }

  async adopt(conversation: string, gone: readonly string[], tab: string): Promise<readonly Row[]> {
    const { outbox } = this.shelf(conversation)
    const taken = [...outbox.values()]
      .filter(row => gone.includes(row.tab))
      .map(row => ({ ...row, tab }))
    for (const row of taken) outbox.set(row.id, row)
    return taken
  }

  async waiting(): Promise<readonly string[]> {
    return [...this.shelves].flatMap(([id, { outbox }]) => (outbox.size > 0 ? [id] : []))
  }

  async forget(conversation: string): Promise<void> {
    this.shelves.delete(conversation)
  }

  async close(): Promise<void> {
    // Memory needs no closing; whoever shares it goes on.
  }

  private shelf(conversation: string): Shelf {
    const known = this.shelves.get(conversation)
    if (known !== undefined) return known
    const shelf: Shelf = { updates: [], cursor: null, outbox: new Map(), refused: new Map() }
    this.shelves.set(conversation, shelf)
    return shelf
  }
}
