/**
 * A conversation as a page sees it: one object that stays, whatever becomes of the replica behind it.
 *
 * This module owns the public writing and reading methods, what listeners hear, and what is shown on
 * this device alone. It must not know frames or storage: a {@link Replica} decides what is sent and
 * kept.
 */

import type {
  Branch,
  Change,
  Conversation,
  ConversationEvents,
  ConversationStatus,
  Entry,
  Grant,
  Meta,
  Params,
  Policy,
  Presence,
  RefusedWrite,
  Unsubscribe,
  Verdict,
  WriteOptions
} from './api.js'
import { compacted, type Document, type Intent, type SlotParams, type Touched } from './document.js'
import { Draft, wellFormed } from './drafts.js'
import type { Environment } from './environment.js'
import { misuse, ProviderError } from './errors.js'
import { Listeners } from './events.js'
import { toJson, toMarkdown } from './export.js'
import type { FromClient, FromRelay } from './frames.js'
import { Keeper } from './keeper.js'
import { closedError, type Port, Replica } from './replica.js'
import {
  characters,
  entryId,
  isEnded,
  NAME_CHARACTERS_MAX,
  POLICY_VALUES,
  ROOT,
  readParams,
  TEXT_BYTES_MAX,
  TITLE_CHARACTERS_MAX,
  utf8
} from './schema.js'
import type { Kept, RefusedRow, Store } from './store.js'
import type { Tabs } from './tabs.js'
import { verifyPath } from './verify.js'

/** What a conversation needs of its client. */
export interface Host {
  readonly device: string
  readonly principal: string | null
  /** The relay's pinned key. */
  readonly relayKey: Uint8Array | null
  readonly environment: Environment
  readonly store: Store
  readonly tabs: Tabs
  send(frame: FromClient): void
  storeFailed(error: unknown): void
  /** Its title may be another. */
  changed(conversation: OpenConversation): void
  /** Its channel is closed for now: open it again. */
  reopen(conversation: OpenConversation): void
  /** It ends; what it keeps is kept once `kept` resolves. */
  closed(conversation: OpenConversation, kept: Promise<void>): void
}

/** A channel that was closed for now is opened again after this. */
const REOPEN_MS_MIN = 1_000
/** The longest such pause. */
const REOPEN_MS_MAX = 60_000

const NOTHING_ASKED: SlotParams = {}

/** An open conversation. */
export class OpenConversation implements Conversation {
  /** The replica behind it. */
  readonly replica: Replica
  hints: boolean
  private readonly listeners = new Listeners<ConversationEvents>()
  private readonly keeper: Keeper
  private readonly draft: Draft
  private looked: string | null = null
  private said: ConversationStatus
  private unsettled = new Map<string, Entry>()
  private collected: { entries: Set<string>; structure: boolean; meta: boolean } | null = null
  private views: { document: Document; version: number; byHead: Map<string, string[]> } | null =
    null
  private oldViews = new Map<string, string[]>()
  private cancelResume: (() => void) | null = null
  private reopened = 0
  private ended = false

  constructor(
    readonly id: string,
    kept: Kept,
    private readonly host: Host,
    hints: boolean
  ) {
    const { environment, store } = host
    this.hints = hints
    this.keeper = new Keeper(store, id, compacted, environment, error => host.storeFailed(error))
    this.draft = new Draft(environment, hint => {
      if (!this.hints || this.replica.standing !== 'open') return false
      host.send({ kind: 'draft', channel: this.replica.onChannel, ...hint })
      return true
    })
    const author = (): { principal: string; device: string } => ({
      principal: host.principal ?? '',
      device: host.device
    })
    this.replica = new Replica(id, host.tabs.tab, kept, author, environment, this.port())
    for (const entry of this.replica.document.tree.entries) this.noteUnsettled(entry)
    this.said = this.currentStatus()
  }

  private port(): Port {
    const { host, id } = this
    return {
      send: frame => host.send(frame),
      keep: (steps, urgent) => this.keeper.keep(steps, urgent),
      compact: () => this.keeper.compact(),
      wrote: rows => host.tabs.post({ kind: 'wrote', conversation: id, rows }),
      settled: (rows, refused) =>
        host.tabs.post({ kind: 'settled', conversation: id, rows, refused }),
      resumeIn: ms => {
        this.cancelResume?.()
        this.cancelResume = host.environment.later(ms, () => this.replica.resume())
      },
      stuck: () => this.reopen(),
      changed: touched => this.collect(touched),
      rebuilt: () => this.collectAll(),
      status: () => this.tellStatus(),
      presence: () => this.listeners.tell('presence', this.presence),
      refused: () => this.listeners.tell('refused', this.refused)
    }
  }

  // -- the connection, for the client ----------------------------------------------------------

  /** A connection is there. */
  attach(channel: number): void {
    this.replica.attach(channel)
  }

  /** It is gone. */
  detach(): void {
    this.cancelResume?.()
    this.cancelResume = null
    this.replica.detach()
  }

  /** A frame of its channel. */
  receive(frame: FromRelay): void {
    this.replica.receive(frame)
    if (frame.kind === 'opened') this.draft.reconnected()
    if (frame.kind === 'ack') this.reopened = 0
    if (frame.kind === 'closed' && this.replica.closed === null) this.reopen()
  }

  /** Open the channel again, after a pause that doubles until a write was taken. */
  private reopen(): void {
    const { environment } = this.host
    const [drawn] = environment.random(new Uint8Array(1))
    const pause = Math.min(REOPEN_MS_MAX, REOPEN_MS_MIN * 2 ** this.reopened++)
    this.cancelResume?.()
    this.cancelResume = environment.later(pause * (1 + (drawn ?? 0) / 256), () =>
      this.host.reopen(this)
    )
  }

  // -- what listeners hear ---------------------------------------------------------------------

  on<Name extends keyof ConversationEvents>(
    event: Name,
    listener: (value: ConversationEvents[Name]) => void
  ): Unsubscribe {
    return this.listeners.on(event, listener)
  }

  private collect({ entries, structure, meta }: Omit<Touched, 'withdrawn'>): void {
    if (this.collected === null) {
      this.collected = { entries: new Set(), structure: false, meta: false }
      // Several transactions of one turn are one change for who renders.
      queueMicrotask(() => this.tellChange())
    }
    for (const entry of entries) this.collected.entries.add(entry)
    this.collected.structure ||= structure
    this.collected.meta ||= meta
  }

  private collectAll(): void {
    const entries = new Set([...this.replica.document.tree.entries, ...this.unsettled.keys()])
    this.collect({ entries, structure: true, meta: true })
  }

  private tellChange(): void {
    const { collected } = this
    this.collected = null
    if (collected === null || this.ended) return
    if (collected.structure) {
      // Where others stand may have changed with that: a request was taken over, an entry admitted.
      for (const [id, before] of this.unsettled) {
        if (this.entry(id) !== before) collected.entries.add(id)
      }
    }
    for (const entry of collected.entries) this.noteUnsettled(entry)
    const change: Change = collected
    if (change.meta) this.tellStatus() // rights are part of it
    this.listeners.tell('change', change)
    if (change.meta) this.host.changed(this)
  }

  private noteUnsettled(id: string): void {
    const entry = this.entry(id)
    if (entry && ['unsent', 'pending', 'streaming', 'superseded'].includes(entry.standing)) {
      this.unsettled.set(id, entry)
    } else {
      this.unsettled.delete(id)
    }
  }

  private tellStatus(): void {
    const now = this.currentStatus()
    const keys = Object.keys(now) as (keyof ConversationStatus)[]
    if (keys.every(key => now[key] === this.said[key])) return
    this.said = now
    this.listeners.tell('status', now)
  }

  private currentStatus(): ConversationStatus {
    const { standing, waiting, grant, behind, closed, problem, document } = this.replica
    const { principal } = this.host
    return {
      state: (
        { detached: 'offline', opening: 'syncing', open: 'synced', closed: 'refused' } as const
      )[standing],
      unsent: waiting,
      grant: (principal === null ? null : document.grantOf(principal)) ?? grant,
      behind,
      code: closed?.code ?? null,
      reason: closed?.reason ?? problem
    }
  }

  // -- reading ---------------------------------------------------------------------------------

  get status(): ConversationStatus {
    return this.said
  }

  get meta(): Meta {
    return this.replica.document.meta
  }

  get access(): ReadonlyMap<string, Grant> {
    return this.replica.document.access()
  }

  get presence(): readonly Presence[] {
    return this.replica.present()
  }

  get refused(): readonly RefusedWrite[] {
    return this.replica.refused.map(described)
  }

  get isEmpty(): boolean {
    return this.meta.owner === null && this.replica.document.tree.size === 0
  }

  entry(id: string): Entry | undefined {
    return this.replica.document.entry(id, this.replica.isUnsent(id))
  }

  view(head: string = this.head): readonly string[] {
    const { document } = this.replica
    const { tree } = document
    if (this.views?.document !== document || this.views.version !== tree.version) {
      this.oldViews = this.views?.byHead ?? this.oldViews
      this.views = { document, version: tree.version, byHead: new Map() }
    }
    const known = this.views.byHead.get(head)
    if (known !== undefined) return known
    const view = tree.view(head)
    const old = this.oldViews.get(head)
    const same = old?.length === view.length && view.every((id, i) => id === old[i])
    const kept = same && old ? old : view
    this.views.byHead.set(head, kept)
    return kept
  }

  entries(head?: string): readonly Entry[] {
    return this.view(head).flatMap(id => this.entry(id) ?? [])
  }

  branches(): readonly Branch[] {
    const { tree } = this.replica.document
    const shown = tree.line(this.head)
    return tree.tips().map(tip => {
      const first = tree.line(tip)
      return { tip, first, parent: first === ROOT ? ROOT : tree.up(first), shown: first === shown }
    })
  }

  siblings(id: string): readonly string[] {
    const { tree } = this.replica.document
    if (!tree.has(id)) return []
    return tree.children(tree.up(id)).filter(other => other === id || !tree.isEnd(other))
  }

  get looking(): string | null {
    return this.looked
  }

  look(head: string | null): void {
    if (head !== null && head !== ROOT) this.need(head)
    if (head === this.looked) return
    this.looked = head
    this.collect({ entries: new Set(), structure: true, meta: false })
  }

  /** The entry whose line this device looks at. */
  private get head(): string {
    const { looked } = this
    const { document } = this.replica
    if (looked !== null && (looked === ROOT || document.tree.has(looked))) return looked
    return document.meta.head
  }

  private get last(): string {
    return this.replica.document.tree.last(this.head)
  }

  private need(id: string): Entry {
    const entry = this.entry(id)
    if (entry === undefined) throw misuse(`conversation ${this.id} has no entry ${id}`)
    return entry
  }

  private needSlot(id: string): Entry {
    const entry = this.need(id)
    if (!entry.isSlot) throw misuse(`entry ${id} is no reply`)
    return entry
  }

  // -- writing ---------------------------------------------------------------------------------

  /** Write what is meant; resolves when it is kept. */
  async write(intent: Intent): Promise<void> {
    if (this.ended) throw misuse(`conversation ${this.id} was closed on this device`)
    if (this.host.principal === null) {
      throw new ProviderError('offline', 'the relay has to say who you are, once: connect first')
    }
    if (this.status.grant === 'reader' && intent.kind !== 'access') {
      throw new ProviderError('refused', 'you may only read this conversation', 'forbidden')
    }
    this.replica.write(intent)
    await this.keeper.flush()
  }

  private newId(): string {
    return entryId(this.host.environment.now(), this.host.environment.random)
  }

  private where(after: string | undefined): { after: string; fork: boolean } {
    const { tree } = this.replica.document
    if (after === undefined) return { after: this.last, fork: false }
    if (after !== ROOT) this.need(after)
    return { after, fork: tree.last(after) !== after }
  }

  async send(
    text: string,
    options: WriteOptions & { role?: 'user' | 'system' } = {}
  ): Promise<string> {
    const id = this.newId()
    await this.writeEntry({
      ...this.where(options.after),
      id,
      role: options.role ?? 'user',
      text: checkedText(text),
      slot: null,
      call: null
    })
    return id
  }

  async ask(
    text: string,
    options: WriteOptions & { params?: Params } = {}
  ): Promise<{ entry: string; slot: string }> {
    const [id, slot] = [this.newId(), this.newId()]
    await this.writeEntry({
      ...this.where(options.after),
      id,
      role: 'user',
      text: checkedText(text),
      slot: { id: slot, params: checkedParams(options.params) },
      call: null
    })
    return { entry: id, slot }
  }

  async edit(id: string, text: string, params?: Params): Promise<{ entry: string; slot: string }> {
    const { born, isSlot } = this.need(id)
    if (isSlot || born.role === 'assistant') {
      throw misuse('the words of the model cannot be edited; regenerate the reply')
    }
    const [entry, slot] = [this.newId(), this.newId()]
    await this.writeEntry({
      after: this.replica.document.tree.up(id),
      fork: true,
      id: entry,
      role: born.role,
      text: checkedText(text),
      slot: { id: slot, params: checkedParams(params) },
      call: born.call
    })
    return { entry, slot }
  }

  private async writeEntry(
    entry: Omit<Intent & { kind: 'entry' }, 'kind' | 'at' | 'head'>
  ): Promise<void> {
    this.draft.submitted()
    const head = entry.fork && entry.slot !== null
    const kept = this.write({ ...entry, kind: 'entry', at: this.host.environment.now(), head })
    if (entry.fork) this.lookAtNew(entry.slot?.id ?? entry.id)
    await kept
  }

  async request(options: WriteOptions & { params?: Params } = {}): Promise<string> {
    return this.writeRequest(this.where(options.after), checkedParams(options.params))
  }

  async regenerate(slot: string, params?: Params): Promise<string> {
    const { seed: _, ...before } = this.needSlot(slot).born.params
    const after = this.replica.document.tree.up(slot)
    return this.writeRequest({ after, fork: true }, { ...before, ...checkedParams(params) })
  }

  async continue(slot: string, params?: Params): Promise<string> {
    const { born, state } = this.needSlot(slot)
    const { tree } = this.replica.document
    if (!isEnded(state) || !tree.isAdmitted(slot)) {
      throw misuse(`reply ${slot} was not cut off: there is nothing to go on from`)
    }
    return this.writeRequest(
      { after: slot, fork: tree.last(slot) !== slot },
      { ...born.params, ...checkedParams(params), extend: true }
    )
  }

  private async writeRequest(
    { after, fork }: { after: string; fork: boolean },
    params: SlotParams
  ): Promise<string> {
    const id = this.newId()
    const at = this.host.environment.now()
    const kept = this.write({ kind: 'request', id, after, fork, at, params, head: fork })
    if (fork) this.lookAtNew(id)
    await kept
    return id
  }

  /** A branch that was just begun here is what this device wants to see. */
  private lookAtNew(id: string): void {
    if (this.replica.document.tree.has(id)) this.look(id)
  }

  async stop(slot: string): Promise<void> {
    this.needSlot(slot)
    await this.write({ kind: 'stop', slot })
  }

  async redact(id: string): Promise<void> {
    this.need(id)
    await this.write({ kind: 'redact', entry: id, at: this.host.environment.now() })
  }

  async rename(title: string): Promise<void> {
    await this.write({ kind: 'meta', key: 'title', value: checkedTitle(title) })
  }

  async setHead(head: string | null): Promise<void> {
    if (head !== null && head !== ROOT) this.need(head)
    const kept = this.write({ kind: 'meta', key: 'head', value: head })
    this.look(null)
    await kept
  }

  async share(principal: string, grant: Grant | null): Promise<void> {
    if (principal === '' || characters(principal) > NAME_CHARACTERS_MAX) {
      throw misuse(`a principal has a name of at most ${NAME_CHARACTERS_MAX} characters`)
    }
    if (principal === this.meta.owner) throw misuse('who made a conversation stays its owner')
    await this.write({ kind: 'access', principal: wellFormed(principal), grant })
  }

  async setPolicy(policy: Partial<Policy>): Promise<void> {
    const value = { ...this.replica.document.policyWritten, ...checkedPolicy(policy) }
    await this.write({ kind: 'meta', key: 'policy', value })
  }

  async setModel(model: string | null): Promise<void> {
    const value = model === null ? null : checkedTitle(model)
    await this.write({ kind: 'meta', key: 'model', value })
  }

  async leave(): Promise<void> {
    const { principal } = this.host
    if (principal === null) throw misuse('who you are is not known yet')
    if (principal === this.meta.owner) throw misuse('who made a conversation stays its owner')
    await this.write({ kind: 'access', principal, grant: null })
  }

  typing(text: string): void {
    if (this.hints) this.draft.typing(text, this.last)
    else this.draft.typing('', ROOT)
  }

  // -- refused writes --------------------------------------------------------------------------

  async discard(refused: string): Promise<void> {
    this.replica.discard(refused)
    await this.keeper.flush()
  }

  async resend(refused: string): Promise<void> {
    const found = this.replica.refused.find(one => one.id === refused)
    if (found === undefined) throw misuse('there is no such refused write')
    // The new write first: if this page ends in between, it is there twice and not gone.
    await this.write(this.again(found.intent))
    await this.discard(refused)
  }

  /** An intent as a new write: with ids of its own, at the end of the line. */
  private again(intent: Intent): Intent {
    const at = this.host.environment.now()
    const end = { after: this.last, fork: false, head: false }
    switch (intent.kind) {
      case 'entry':
        return {
          ...intent,
          ...end,
          at,
          id: this.newId(),
          slot: intent.slot && { ...intent.slot, id: this.newId() }
        }
      case 'request':
        return { ...intent, ...end, at, id: this.newId() }
      default:
        return intent
    }
  }

  // -- checking and taking away ----------------------------------------------------------------

  async verify(head?: string): Promise<readonly Verdict[]> {
    return verifyPath(this.replica.document, this.id, this.view(head), this.host.relayKey)
  }

  sealed(id: string): readonly Uint8Array[] {
    return this.replica.document.sealed(id)
  }

  export(format: 'json' | 'markdown'): string {
    const entries = [...this.replica.document.tree.entries].flatMap(id => this.entry(id) ?? [])
    const exported = {
      id: this.id,
      meta: this.meta,
      access: this.access,
      entries,
      view: this.view()
    }
    return format === 'json' ? toJson(exported) : toMarkdown(exported)
  }

  // -- waiting ---------------------------------------------------------------------------------

  settled(): Promise<void> {
    return this.until(() => this.replica.waiting === 0)
  }

  synced(): Promise<void> {
    return this.until(() => this.replica.heard)
  }

  private until(holds: () => boolean): Promise<void> {
    return new Promise((resolve, reject) => {
      const look = (): boolean => {
        const { closed } = this.replica
        if (holds()) resolve()
        else if (closed !== null) reject(closedError(closed))
        else if (this.ended) reject(misuse(`conversation ${this.id} was closed on this device`))
        else return false
        return true
      }
      if (look()) return
      const stop = this.on('status', () => {
        if (look()) stop()
      })
    })
  }

  async close(): Promise<void> {
    if (this.ended) return
    this.ended = true
    this.cancelResume?.()
    this.draft.submitted()
    this.replica.close()
    const kept = this.keeper.close()
    this.host.closed(this, kept)
    this.listeners.tell('status', this.said) // whoever waits hears that it is over
    await kept
  }
}

const checkedText = (text: string): string => {
  const checked = wellFormed(text)
  const { length } = utf8(checked)
  if (length > TEXT_BYTES_MAX) throw misuse(`a text has at most ${TEXT_BYTES_MAX} bytes`)
  return checked
}

/** A title or a model's name that a relay takes. */
export const checkedTitle = (title: string): string => {
  const checked = wellFormed(title)
  if (characters(checked) > TITLE_CHARACTERS_MAX) {
    throw misuse(`a title has at most ${TITLE_CHARACTERS_MAX} characters`)
  }
  return checked
}

/** What every replica would read as it is meant here. */
const checkedParams = (params: Params = NOTHING_ASKED): SlotParams => {
  const given = Object.entries(params).filter(([, value]) => value !== undefined)
  const read = readParams(Object.fromEntries(given)) as Record<string, unknown>
  for (const [key, value] of given) {
    const nothing = value === false || (Array.isArray(value) && value.length === 0)
    if (!nothing && JSON.stringify(read[key]) !== JSON.stringify(value)) {
      throw misuse(`the parameter ${key} is unknown or out of range`)
    }
  }
  return read
}

/** Known keys with known values. */
export const checkedPolicy = (policy: Partial<Policy>): Partial<Policy> => {
  const given = Object.entries(policy).filter(([, value]) => value !== undefined)
  for (const [key, value] of given) {
    const values: readonly unknown[] = Object.hasOwn(POLICY_VALUES, key)
      ? POLICY_VALUES[key as keyof Policy]
      : []
    if (!values.includes(value)) throw misuse(`the policy has no ${key} = ${String(value)}`)
  }
  return Object.fromEntries(given)
}

const described = ({ id, intent, code, rule, reason, at }: RefusedRow): RefusedWrite => ({
  id,
  kind: intent.kind,
  text: textOf(intent),
  code,
  rule,
  reason,
  at
})

const textOf = (intent: Intent): string => {
  if (intent.kind === 'entry') return intent.text
  return intent.kind === 'meta' && intent.key === 'title' ? String(intent.value ?? '') : ''
}
