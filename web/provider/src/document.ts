/**
 * One replica of one conversation: the only doorway to Yjs.
 *
 * This module owns the `Y.Doc`: merging updates, typed reading, and composing writes exactly as
 * protocol/SCHEMA.md has them. It must not know sockets, storage, or what is acknowledged.
 *
 * A write begins as an {@link Intent}, which says what is meant and not how: it can be composed again
 * on another document, under another client id, when the first attempt was refused with others.
 */

import * as Y from 'yjs'
import type { Born, Entry, Grant, Meta, Params, Policy, Role, Standing } from './api.js'
import {
  isEnded,
  isEntryId,
  isMap,
  ROOT,
  readBirth,
  readBorn,
  readBytes,
  readGrant,
  readMeta,
  readPlace,
  readProof,
  readRedacted,
  readState,
  readStrings,
  readUsage,
  SCHEMA_VERSION
} from './schema.js'
import { decodeStateVector, type StateVector } from './state-vector.js'
import { Tree } from './tree.js'

/** The bytes of an update that says nothing. */
export const EMPTY_UPDATE: Uint8Array = Uint8Array.of(0, 0)

/** What a slot asks for; `extend` goes on with the reply before. */
export type SlotParams = Params & { readonly extend?: boolean }

/** Something that a person wants to happen to a conversation. Plain values alone: it is stored. */
export type Intent =
  | {
      readonly kind: 'create'
      readonly owner: string
      readonly nonce: Uint8Array
      readonly at: number
      readonly title: string | null
      readonly model: string | null
      readonly policy: Partial<Policy> | null
    }
  | {
      /** An entry, and with `slot` a request for a reply to it. */
      readonly kind: 'entry'
      readonly id: string
      readonly role: Exclude<Role, 'assistant'>
      readonly text: string
      readonly call: string | null
      readonly after: string
      readonly fork: boolean
      readonly at: number
      readonly slot: { readonly id: string; readonly params: SlotParams } | null
      /** Whether everybody shall look at it. */
      readonly head: boolean
    }
  | {
      readonly kind: 'request'
      readonly id: string
      readonly after: string
      readonly fork: boolean
      readonly at: number
      readonly params: SlotParams
      readonly head: boolean
    }
  | { readonly kind: 'stop'; readonly slot: string }
  | { readonly kind: 'redact'; readonly entry: string; readonly at: number }
  | {
      readonly kind: 'meta'
      readonly key: 'title' | 'head' | 'model' | 'policy'
      /** `null` removes the key. */
      readonly value: string | Partial<Policy> | null
    }
  | { readonly kind: 'access'; readonly principal: string; readonly grant: Grant | null }

/** Who writes. */
export interface Author {
  readonly principal: string
  readonly device: string
}

/** What one transaction touched. */
export interface Touched {
  readonly entries: ReadonlySet<string>
  readonly structure: boolean
  readonly meta: boolean
  /** Whether text was withdrawn, which must not stay in storage. */
  readonly withdrawn: boolean
}

const STRUCTURAL: ReadonlySet<unknown> = new Set(['born', 'place', 'state', 'stop', 'redacted'])
const REDACTION_DELETES = ['content', 'salt', 'sealed', 'calls'] as const
const CLEARED: ReadonlySet<unknown> = new Set(REDACTION_DELETES)
const ROOTS = ['meta', 'access', 'leases', 'entries'] as const
const COMPOSED = 'composed'

/** A replica. Its listener hears of every transaction, after it. */
export class Document {
  readonly tree = new Tree()
  private readonly doc: Y.Doc
  private readonly roots: Readonly<Record<(typeof ROOTS)[number], Y.Map<unknown>>>
  private readonly borns = new Map<string, Born>()
  private readonly cache = new Map<string, Entry>()
  private metaCache: Meta | null = null
  private touched = { entries: new Set<string>(), meta: false, withdrawn: false }
  private structure = new Set<string>()
  private composed: Uint8Array | null = null

  /**
   * @param clientId 32 bits, fresh for each document and never used again.
   * @param changed Is told what each transaction touched.
   */
  constructor(clientId: number, changed: (touched: Touched) => void = () => undefined) {
    this.doc = new Y.Doc()
    this.doc.clientID = clientId
    const map = (name: string): Y.Map<unknown> => this.doc.getMap(name)
    this.roots = {
      meta: map('meta'),
      access: map('access'),
      leases: map('leases'),
      entries: map('entries')
    }
    for (const name of ROOTS) {
      this.roots[name].observeDeep(events => {
        for (const event of events) this.collect(name, event)
      })
    }
    this.doc.on('update', (update: Uint8Array, origin: unknown) => {
      if (origin === COMPOSED) this.composed = update
    })
    this.doc.on('afterTransaction', () => {
      const touched = this.settle()
      if (touched !== null) changed(touched)
    })
  }

  // -- what happened ---------------------------------------------------------------------------

  private collect(root: (typeof ROOTS)[number], event: Y.YEvent<Y.AbstractType<unknown>>): void {
    if (root === 'meta' || root === 'access') this.touched.meta = true
    if (root !== 'entries') return
    const [entry] = event.path
    const keys = event instanceof Y.YMapEvent ? event.keysChanged : null
    if (entry === undefined) {
      for (const key of keys ?? []) {
        if (key !== null) {
          this.touched.entries.add(key)
          this.structure.add(key)
        }
      }
      return
    }
    this.touched.entries.add(String(entry))
    if (event.path.length > 1 || keys === null) return
    for (const key of keys) {
      if (STRUCTURAL.has(key)) this.structure.add(String(entry))
      // A salt that was written beside a withdrawal goes with the node's next word, not with it.
      const isCleared = CLEARED.has(key) && event.changes.keys.get(String(key))?.action === 'delete'
      if (key === 'redacted' || isCleared) this.touched.withdrawn = true
    }
  }

  private settle(): Touched | null {
    const { entries, meta, withdrawn } = this.touched
    if (entries.size === 0 && !meta) return null
    const refreshed = [...this.structure]
    this.touched = { entries: new Set(), meta: false, withdrawn: false }
    this.structure = new Set()
    if (meta) this.metaCache = null
    for (const entry of entries) this.cache.delete(entry)
    const structure = refreshed.filter(entry => this.refresh(entry)).length > 0
    return { entries, structure, meta, withdrawn }
  }

  /** Tell the tree what it needs to know of an entry; whether that changed anything. */
  private refresh(entry: string): boolean {
    const fields = this.fields(entry)
    const born = readBorn(fields?.get('born'))
    if (fields === null || born === null) {
      this.borns.delete(entry)
      return this.tree.drop(entry)
    }
    this.borns.set(entry, born)
    const slot = born.role === 'assistant'
    const place = readPlace(fields.get('place'))
    return this.tree.put({
      id: entry,
      clock: born.clock,
      slot,
      fork: born.fork,
      after: born.after,
      parent: place?.parent ?? null,
      epoch: place?.epoch ?? 0,
      ended:
        isMap(fields.get('redacted')) ||
        (slot &&
          (isEnded(readState(fields.get('state'))) || typeof fields.get('stop') === 'string'))
    })
  }

  // -- replication -----------------------------------------------------------------------------

  /** The id that this replica writes under. */
  get clientId(): number {
    return this.doc.clientID
  }

  /** Merge an update. */
  apply(update: Uint8Array): void {
    Y.applyUpdate(this.doc, update, 'merged')
  }

  /** Merge several updates as one change. */
  applyAll(updates: readonly Uint8Array[]): void {
    this.doc.transact(() => {
      for (const update of updates) this.apply(update)
    }, 'merged')
  }

  /** Whether something was merged that builds on what is not here. */
  get lacks(): boolean {
    return this.doc.store.pendingStructs !== null || this.doc.store.pendingDs !== null
  }

  /** All that a replica with `known` lacks; without it, everything. */
  diff(known?: Uint8Array): Uint8Array {
    return Y.encodeStateAsUpdate(this.doc, known)
  }

  /** What this replica has. */
  stateVector(): StateVector {
    return decodeStateVector(Y.encodeStateVector(this.doc))
  }

  /** Let go of the memory. */
  destroy(): void {
    this.doc.destroy()
  }

  // -- reading ---------------------------------------------------------------------------------

  private fields(entry: string): Y.Map<unknown> | null {
    const fields = this.roots.entries.get(entry)
    return fields instanceof Y.Map && isEntryId(entry) ? fields : null
  }

  /** The conversation's own facts. */
  get meta(): Meta {
    this.metaCache ??= readMeta(key => this.roots.meta.get(key))
    return this.metaCache
  }

  /** The policy as it was written, key by key. */
  get policyWritten(): Partial<Policy> {
    const value = this.roots.meta.get('policy')
    return isMap(value) ? value : {}
  }

  /** Everybody with a right. */
  access(): Map<string, Grant> {
    const access = new Map<string, Grant>()
    for (const [principal, value] of this.roots.access.entries()) {
      const grant = readGrant(value)
      if (grant !== null) access.set(principal, grant)
    }
    const birth = readBirth(this.roots.meta.get('birth'))
    if (birth !== null) access.set(birth.owner, 'owner')
    return access
  }

  /** What a principal may do. */
  grantOf(principal: string): Grant | null {
    if (this.meta.owner === principal) return 'owner'
    return readGrant(this.roots.access.get(principal))
  }

  /** Who was the node under an epoch. */
  lease(epoch: number): { node: Uint8Array; signature: Uint8Array } | null {
    const value = this.roots.leases.get(String(epoch))
    if (!isMap(value)) return null
    const [node, signature] = [readBytes(value.node), readBytes(value.signature)]
    return node === null || signature === null ? null : { node, signature }
  }

  /** The epochs from `first` on that have a lease, in order. */
  epochs(first: number): number[] {
    return [...this.roots.leases.keys()]
      .filter(key => /^(0|[1-9][0-9]{0,15})$/.test(key))
      .map(Number)
      .filter(epoch => epoch >= first && this.lease(epoch) !== null)
      .sort((a, b) => a - b)
  }

  /** An entry's `born`. O(1). */
  born(entry: string): Born | undefined {
    return this.borns.get(entry)
  }

  /** An entry's `born` with every key that it has: what the chain commits to. */
  bornPlain(entry: string): unknown {
    return this.fields(entry)?.get('born')
  }

  /** The sealed blobs of a slot. */
  sealed(entry: string): Uint8Array[] {
    const sealed = this.fields(entry)?.get('sealed')
    return sealed instanceof Y.Array
      ? sealed.toArray().filter((one): one is Uint8Array => one instanceof Uint8Array)
      : []
  }

  /**
   * An entry as it is now; the same object for as long as nothing about it changed.
   *
   * @param unsent Whether it waits to be sent; what a document cannot know.
   */
  entry(id: string, unsent: boolean): Entry | undefined {
    const known = this.cache.get(id)
    if (known !== undefined) return this.standingNow(known, unsent)
    const [fields, born] = [this.fields(id), this.borns.get(id)]
    if (fields === null || born === undefined) return undefined
    const isSlot = born.role === 'assistant'
    const [content, stop, calls] = [fields.get('content'), fields.get('stop'), fields.get('calls')]
    const redacted = readRedacted(fields.get('redacted'))
    const read: Entry = {
      id,
      born,
      content:
        redacted === null && (typeof content === 'string' || content instanceof Y.Text)
          ? content.toString()
          : '',
      standing: 'pending',
      isSlot,
      state: isSlot ? readState(fields.get('state')) : null,
      stop: isSlot && typeof stop === 'string' ? stop : null,
      place: readPlace(fields.get('place')),
      usage: readUsage(fields.get('usage')),
      calls: Array.isArray(calls) ? calls : null,
      reads: readStrings(fields.get('reads')),
      proof: readProof(fields.get('proof')),
      salt: readBytes(fields.get('salt')),
      redacted
    }
    this.cache.set(id, read)
    return this.standingNow(read, unsent)
  }

  private standingNow(entry: Entry, unsent: boolean): Entry {
    const standing = this.standing(entry, unsent)
    if (standing === entry.standing) return entry
    const now = { ...entry, standing }
    this.cache.set(entry.id, now)
    return now
  }

  private standing(entry: Entry, unsent: boolean): Standing {
    if (entry.redacted !== null) return 'redacted'
    if (unsent) return 'unsent'
    if (!entry.isSlot) return this.tree.isAdmitted(entry.id) ? 'settled' : 'pending'
    if (entry.state !== null) return entry.state === 'done' ? 'settled' : entry.state
    if (entry.stop !== null) return 'stopped'
    return this.tree.isSuperseded(entry.id) ? 'superseded' : 'pending'
  }

  // -- writing ---------------------------------------------------------------------------------

  /**
   * Write what is meant, in one transaction. See {@link resolve} for intents that are not new.
   *
   * @returns The update; `null` if it is so already, or cannot be any more (what it is about is not
   *   here). Then nothing was written.
   */
  compose(intent: Intent, author: Author): Uint8Array | null {
    this.composed = null
    this.doc.transact(() => this.write(intent, author), COMPOSED)
    const update = this.composed
    this.composed = null
    return update
  }

  private write(intent: Intent, author: Author): void {
    const { meta, access } = this.roots
    switch (intent.kind) {
      case 'create':
        return this.writeBirth(intent)
      case 'entry':
        return this.writeEntry(intent, author)
      case 'request':
        if (this.roots.entries.has(intent.id)) return
        this.add(intent.id, {
          ...this.bornNow('assistant', intent, intent.at, author),
          ...params(intent.params)
        })
        if (intent.head) meta.set('head', intent.id)
        return
      case 'stop':
        if (this.borns.get(intent.slot)?.role !== 'assistant') return
        this.fields(intent.slot)?.set('stop', author.principal)
        return
      case 'redact':
        return this.writeRedaction(intent, author)
      case 'meta':
        if (intent.value !== null) meta.set(intent.key, intent.value)
        else if (meta.has(intent.key)) meta.delete(intent.key)
        return
      case 'access':
        if (intent.grant !== null) access.set(intent.principal, intent.grant)
        else if (access.has(intent.principal)) access.delete(intent.principal)
    }
  }

  private writeBirth(intent: Intent & { kind: 'create' }): void {
    const { meta } = this.roots
    if (meta.has('birth')) return
    meta.set('schema', SCHEMA_VERSION)
    meta.set('birth', { owner: intent.owner, nonce: intent.nonce })
    meta.set('created_at', intent.at)
    if (intent.title) meta.set('title', intent.title)
    if (intent.model) meta.set('model', intent.model)
    if (intent.policy !== null) meta.set('policy', intent.policy)
  }

  private writeRedaction(intent: Intent & { kind: 'redact' }, author: Author): void {
    const fields = this.fields(intent.entry)
    if (fields === null || !this.borns.has(intent.entry)) return
    fields.set('redacted', { by: author.principal, at: intent.at })
    for (const key of REDACTION_DELETES) if (fields.has(key)) fields.delete(key)
  }

  private writeEntry(intent: Intent & { kind: 'entry' }, author: Author): void {
    if (this.roots.entries.has(intent.id)) return
    const born = this.bornNow(intent.role, intent, intent.at, author)
    const call = intent.call === null ? {} : { call: intent.call }
    this.add(intent.id, { ...born, ...call }, intent.text)
    if (intent.slot !== null) {
      this.add(intent.slot.id, {
        ...born,
        role: 'assistant',
        clock: born.clock + 1,
        mode: 'continue',
        after: intent.id,
        ...params(intent.slot.params)
      })
    }
    if (intent.head) this.roots.meta.set('head', intent.slot?.id ?? intent.id)
  }

  private add(id: string, born: Record<string, unknown>, content?: string): void {
    const fields = new Y.Map<unknown>()
    fields.set('born', born)
    if (content !== undefined) fields.set('content', content)
    this.roots.entries.set(id, fields)
  }

  /**
   * The intent as it is to be composed here: what was written after something that never came to be
   * goes to the end of the line.
   */
  resolve(intent: Intent): Intent {
    if (intent.kind !== 'entry' && intent.kind !== 'request') return intent
    if (intent.after === ROOT || this.tree.has(intent.after)) return intent
    return { ...intent, after: this.tree.last(this.meta.head), fork: false }
  }

  private bornNow(
    role: Role,
    { after, fork }: { after: string; fork: boolean },
    at: number,
    author: Author
  ): { clock: number } & Record<string, unknown> {
    return {
      role,
      author: author.principal,
      device: author.device,
      at,
      clock: this.tree.clock + 1,
      mode: fork ? 'fork' : 'continue',
      ...(after === ROOT ? {} : { after })
    }
  }
}

const params = (given: SlotParams): { params?: SlotParams } => {
  const named = Object.fromEntries(
    Object.entries(given).filter(([, value]) => value !== undefined && value !== false)
  )
  return Object.keys(named).length > 0 ? { params: named } : {}
}

// -- updates, without a document ---------------------------------------------------------------

/** Of each client the clocks that an update holds: from (inclusive) and to (exclusive). */
export const clocksOf = (update: Uint8Array): { from: StateVector; to: StateVector } =>
  Y.parseUpdateMeta(update)

/** Several updates as one, without what was deleted in them: withdrawn text is really gone. */
export const compacted = (updates: readonly Uint8Array[]): Uint8Array => {
  const doc = new Y.Doc()
  doc.transact(() => {
    for (const update of updates) Y.applyUpdate(doc, update)
  })
  const merged = Y.encodeStateAsUpdate(doc)
  doc.destroy()
  return merged
}

/** The part of a document, given as updates, that a replica with `known` lacks. */
export const lacking = (updates: readonly Uint8Array[], known: Uint8Array): Uint8Array => {
  const doc = new Y.Doc()
  doc.transact(() => {
    for (const update of updates) Y.applyUpdate(doc, update)
  })
  const missing = Y.encodeStateAsUpdate(doc, known)
  doc.destroy()
  return missing
}
