/**
 * A conversation's acknowledged part, its outbox, and how both meet a relay: without any I/O.
 *
 * This module owns what is sent when, what an acknowledgement and a refusal do, and what is kept. It
 * must not know sockets, timers or storage: it is given frames and answers through a {@link Port}.
 *
 * What is shown is one document: everything acknowledged, then the rows of the outbox in their order
 * (and those of other tabs). The invariants:
 *
 * 1. `acknowledged` holds only what the relay has made durable. Its bytes are kept apart from rows.
 * 2. A row leaves the outbox when it was acknowledged or refused, never otherwise.
 * 3. After a refusal the document is built anew under a fresh client id from the acknowledged part
 *    and the rows that are left. A row that built on the refused one (the clocks of its client have a
 *    gap now, or what it was written after is missing) cannot have been taken by the relay: it is
 *    composed again from its intent. Every other row keeps its bytes, so that nothing is ever written
 *    twice, whatever became of the answers.
 * 4. `cursor` moves only when everything up to it is here.
 */

import type { Grant, Presence } from './api.js'
import {
  type Author,
  clocksOf,
  compacted,
  Document,
  EMPTY_UPDATE,
  type Intent,
  lacking,
  type Touched
} from './document.js'
import { clientId, type Environment, uniqueName } from './environment.js'
import { ProviderError } from './errors.js'
import type { AwarenessState, FromClient, FromRelay, Nack, Opened } from './frames.js'
import { ROOT, readGrant } from './schema.js'
import { covers, decodeStateVector, encodeStateVector, type StateVector } from './state-vector.js'
import type { Cursor, Kept, RefusedRow, Row, Step } from './store.js'

/** Updates under way at once. A relay stops reading from a connection with 64 that wait. */
export const IN_FLIGHT_MAX = 32
/**
 * Acknowledged bytes kept update by update before they are put together, or as many as the document
 * had the last time: putting together costs a whole document, so it waits until that doubled.
 */
export const TAIL_BYTES_MIN = 256 << 10
/** The close code of a conversation in which there is no right. */
const FORBIDDEN = 4403
/** A wait after a refusal for now that names none. */
const RETRY_MS = 1_000

/** How a replica acts on the world. */
export interface Port {
  /** Send a frame on the connection; only called between `attach` and `detach`. */
  send(frame: FromClient): void
  /** Keep steps: at once if somebody waits for it, else in a while. */
  keep(steps: readonly Step[], urgent: boolean): void
  /** Put what is kept together; text that was withdrawn must go from the disk. */
  compact(): void
  /** Tell other tabs. */
  wrote(rows: readonly Row[]): void
  settled(rows: readonly string[], refused: boolean): void
  /** Call {@link Replica.resume} after a while, unless detached before. */
  resumeIn(ms: number): void
  /** The relay and this replica do not come together: it left the channel; open it again later. */
  stuck(reason: string): void
  /** The document changed. */
  changed(touched: Touched): void
  /** The document was built anew: everything may be another. */
  rebuilt(): void
  /** Status, presence, or the list of refused writes changed. */
  status(): void
  presence(): void
  refused(): void
}

/** Where a replica stands towards the relay. */
export type Standing = 'detached' | 'opening' | 'open' | 'closed'

interface InFlight {
  /** The rows it carries; none for a restore. */
  readonly rows: readonly Row[]
  readonly restore: boolean
}

/** The intents that only make sense for entries of the document. */
const entriesOf = (intent: Intent): string[] => {
  if (intent.kind === 'request') return [intent.id]
  if (intent.kind !== 'entry') return []
  return intent.slot === null ? [intent.id] : [intent.id, intent.slot.id]
}

const afterOf = (intent: Intent): string =>
  intent.kind === 'entry' || intent.kind === 'request' ? intent.after : ROOT

/** One conversation between a device and its relay. */
export class Replica {
  document: Document
  standing: Standing = 'detached'
  grant: Grant | null = null
  behind = false
  /** Why the relay closed the channel for good; `null` if it did not. */
  closed: { code: number; reason: string } | null = null
  /** Why what waits is not sent although the channel is open; `''` if all is well. */
  problem = ''
  /** Whether the relay was heard of since this was opened. */
  heard = false
  readonly refused: RefusedRow[]

  private acknowledged: Uint8Array[]
  private tailBytes = 0 // of the acknowledged updates behind the first
  private withdrawn = false // text was withdrawn that is still among them
  private sent = new Set<string>() // rows that were sent, ever
  private once = new Set<string>() // those of them that were sent once
  private known = new Map<number, number>() // the state vector of the acknowledged part
  private cursor: Cursor | null
  private outbox: Row[] = []
  private foreign: Row[] = []
  private unsent = new Map<string, number>() // entry -> how many rows make it
  private channel = 0
  private nextId = 1
  private lastOrder = 0
  private flights = new Map<number, InFlight>()
  private paused = false
  private gaps = 0
  private alone = false // rows of other tabs are not shown: together with ours something is refused
  private building = false
  private peers = new Map<number, { clock: number; state: unknown }>()
  private presenceClock = 0

  /**
   * @param id The conversation's.
   * @param tab Whose outbox this is.
   * @param kept What the store has.
   * @param author Who writes; asked at each write.
   */
  constructor(
    readonly id: string,
    private readonly tab: string,
    kept: Kept,
    private readonly author: () => Author,
    private readonly environment: Environment,
    private readonly port: Port
  ) {
    this.acknowledged = [...kept.updates]
    this.cursor = kept.cursor
    this.refused = [...kept.refused]
    for (const update of kept.updates) {
      this.learn(update)
      this.tailBytes += update.length
    }
    this.tailBytes -= kept.updates[0]?.length ?? 0
    this.outbox = kept.outbox.filter(row => row.tab === tab)
    for (const row of kept.outbox) {
      this.sent.add(row.id) // maybe, by who left it
      this.lastOrder = Math.max(this.lastOrder, row.order)
    }
    this.foreign = kept.outbox.filter(row => row.tab !== tab)
    this.document = this.build()
    this.count()
  }

  // -- reading ---------------------------------------------------------------------------------

  /** Own writes that are not acknowledged. */
  get waiting(): number {
    return this.outbox.length
  }

  /** Whether an entry is in an outbox. */
  isUnsent(entry: string): boolean {
    return this.unsent.has(entry)
  }

  /** The entries that are in an outbox. */
  get unsentEntries(): IterableIterator<string> {
    return this.unsent.keys()
  }

  /** The channel of the connection, while attached. */
  get onChannel(): number {
    return this.channel
  }

  /** Who is here. */
  present(): Presence[] {
    const own = this.document.clientId
    return [...this.peers].map(([client, { state }]) => readPresence(client, state, client === own))
  }

  // -- building --------------------------------------------------------------------------------

  /**
   * The document of the acknowledged part and all rows. Rows that cannot stand any more are composed
   * again, or left out if they say nothing any more.
   *
   * @param fallen Rows that are known not to stand.
   */
  private build(fallen: ReadonlySet<string> = new Set()): Document {
    this.building = true
    const document = new Document(this.freshClient(), touched => {
      this.withdrawn ||= touched.withdrawn
      if (!this.building) this.port.changed(touched)
    })
    document.applyAll(this.acknowledged)
    const rows: Row[] = []
    const steps: Step[] = []
    const anew: Row[] = []
    for (const row of this.outbox) {
      if (!fallen.has(row.id) && stands(document, row)) {
        document.apply(row.update)
        if (document.lacks) {
          // It builds on something else that is not here, which only Yjs can tell.
          document.destroy()
          return this.build(new Set([...fallen, row.id]))
        }
        rows.push(row)
        continue
      }
      // The resolved intent is kept, so that from now on the row stands by itself.
      const intent = document.resolve(row.intent)
      const update = document.compose(intent, this.author())
      if (update === null) {
        steps.push({ step: 'drop', row: row.id })
        continue
      }
      const composed = { ...row, intent, update }
      rows.push(composed)
      anew.push(composed)
      steps.push({ step: 'put', row: composed })
    }
    this.outbox = rows
    this.foreign = this.alone ? this.foreign : this.showForeign(document)
    if (steps.length > 0) this.port.keep(steps, true)
    if (anew.length > 0) this.port.wrote(anew)
    this.building = false
    this.withdrawn = false // of what was put together only; a row may yet be refused
    return document
  }

  /** Show what other tabs wrote, where it stands; the rest comes once it is acknowledged. */
  private showForeign(document: Document): Row[] {
    return this.foreign.filter(row => {
      const fits = stands(document, row)
      if (fits) document.apply(row.update)
      return fits
    })
  }

  private rebuild(): void {
    const old = this.document
    this.document = this.build()
    old.destroy()
    this.count()
    this.port.rebuilt()
    if (this.standing === 'open') {
      this.send({ kind: 'presence', channel: this.channel, states: [this.goodbye(old.clientId)] })
      this.peers.delete(old.clientId)
      this.introduce()
    }
  }

  private freshClient(): number {
    for (;;) {
      const drawn = clientId(this.environment.random)
      const used = (row: Row): boolean => clocksOf(row.update).to.has(drawn)
      if (!this.known.has(drawn) && !this.outbox.some(used) && !this.foreign.some(used)) {
        return drawn
      }
    }
  }

  private count(): void {
    this.unsent = new Map()
    for (const row of [...this.outbox, ...this.foreign]) {
      for (const entry of entriesOf(row.intent)) {
        this.unsent.set(entry, (this.unsent.get(entry) ?? 0) + 1)
      }
    }
  }

  // -- writing ---------------------------------------------------------------------------------

  /**
   * Write what is meant: shown now, kept soon, sent when there is a connection.
   *
   * @returns Whether that changed anything.
   */
  write(intent: Intent): boolean {
    const update = this.document.compose(intent, this.author())
    this.withdrawn = false // only once it is acknowledged
    if (update === null) return false
    this.lastOrder = Math.max(this.lastOrder + 1, this.environment.now())
    const row: Row = {
      id: uniqueName(this.environment.random),
      tab: this.tab,
      order: this.lastOrder,
      intent,
      update
    }
    this.outbox.push(row)
    this.count()
    // The document told of these entries before they were known to be unsent.
    this.announce(entriesOf(intent))
    this.port.keep([{ step: 'put', row }], true)
    this.port.wrote([row])
    this.flush()
    this.port.status()
    return true
  }

  /** Forget a refused write; the intent, for who wants to write it again. */
  discard(refused: string): Intent | null {
    const at = this.refused.findIndex(one => one.id === refused)
    const [found] = at < 0 ? [] : this.refused.splice(at, 1)
    if (found === undefined) return null
    this.port.keep([{ step: 'discard', refused }], true)
    this.port.refused()
    return found.intent
  }

  // -- other tabs ------------------------------------------------------------------------------

  /** Another tab wrote: show it. It sends that itself. */
  hear(rows: readonly Row[]): void {
    const news = rows.filter(
      row => ![...this.outbox, ...this.foreign].some(known => known.id === row.id)
    )
    if (this.alone || news.length === 0) return
    for (const row of news) {
      this.lastOrder = Math.max(this.lastOrder, row.order) // what is written now comes after it
      if (!stands(this.document, row)) continue // it comes once it is acknowledged
      this.foreign.push(row)
      this.document.apply(row.update)
    }
    this.count()
    this.announce(news.flatMap(row => entriesOf(row.intent)))
  }

  /** What another tab wrote was acknowledged, or refused. */
  hearSettled(ids: readonly string[], refused: boolean): void {
    const gone = this.foreign.filter(row => ids.includes(row.id))
    if (gone.length === 0) return
    this.foreign = this.foreign.filter(row => !ids.includes(row.id))
    if (refused) return this.rebuild()
    for (const row of gone) this.acknowledge(row.update)
    if (gone.some(row => row.intent.kind === 'redact')) this.compact()
    this.count()
    this.announce(gone.flatMap(row => entriesOf(row.intent)))
  }

  /** Send what a tab left that is gone. */
  adopt(rows: readonly Row[]): void {
    const ids = new Set(rows.map(row => row.id))
    this.foreign = this.foreign.filter(row => !ids.has(row.id))
    const fresh = rows.filter(row => !this.outbox.some(known => known.id === row.id))
    if (fresh.length === 0) return
    for (const row of fresh) this.sent.add(row.id) // maybe, by who left it
    this.outbox = [...this.outbox, ...fresh].sort((a, b) => a.order - b.order)
    this.rebuild()
    this.flush()
    this.port.status()
  }

  /** The tabs whose rows are shown here. */
  get otherTabs(): string[] {
    return [...new Set(this.foreign.map(row => row.tab))]
  }

  // -- the connection --------------------------------------------------------------------------

  /** A connection is there: ask for what is missing. */
  attach(channel: number): void {
    this.standing = 'opening'
    this.closed = null
    this.problem = ''
    this.channel = channel
    this.nextId = 1
    this.flights = new Map()
    this.paused = false
    this.gaps = 0
    this.send({
      kind: 'open',
      channel,
      conversation: this.id,
      log: this.cursor?.log ?? null,
      lsn: this.cursor?.lsn ?? 0,
      stateVector: encodeStateVector(this.known)
    })
    this.port.status()
  }

  /** The connection, or the channel, is gone. */
  detach(): void {
    if (this.standing === 'detached') return
    this.standing = 'detached'
    this.flights = new Map()
    this.peers = new Map()
    this.port.status()
    this.port.presence()
  }

  /** A frame of this replica's channel. */
  receive(frame: FromRelay): void {
    switch (frame.kind) {
      case 'opened':
        return this.opened(frame)
      case 'change':
      case 'state':
        return this.merged(frame.update, frame.lsn)
      case 'ack':
        return this.acked(frame.id, frame.lsn)
      case 'nack':
        return this.nacked(frame)
      case 'presence':
        return this.hearPresence(frame.states)
      case 'closed':
        if (frame.code >= 4400 && frame.code <= 4499) {
          if (frame.code === FORBIDDEN) this.expelled()
          this.closed = { code: frame.code, reason: frame.reason }
          this.detach()
          this.standing = 'closed'
          this.port.status()
        } else {
          this.problem = frame.reason
          this.detach()
        }
        return
      default: // frames for nodes are not sent to clients
    }
  }

  /** There is no right any more. If that is what was asked for, it came true. */
  private expelled(): void {
    this.grant = null
    const { principal } = this.author()
    this.settle(
      this.outbox.filter(
        ({ intent }) =>
          intent.kind === 'access' && intent.principal === principal && intent.grant === null
      )
    )
  }

  private opened(frame: Opened): void {
    this.standing = 'open'
    this.heard = true
    this.grant = readGrant(frame.grant)
    this.behind = frame.behind
    if (!this.take(frame.update, { log: frame.log, lsn: frame.lsn })) {
      this.cursor = null // then it tells what is missing by what is here
      return this.giveUp('what the relay sent builds on what is not here')
    }
    const relay = decodeStateVector(frame.stateVector)
    if (!covers(relay, this.known)) this.restore(frame.stateVector)
    // A lost acknowledgement: the relay has the write, so it need not travel again.
    const taken = this.outbox.filter(row => isCovered(row.update, relay))
    if (taken.length > 0) this.settle(taken)
    this.introduce()
    this.flush()
    this.port.status()
  }

  private restore(relay: Uint8Array): void {
    const id = this.nextId++
    this.flights.set(id, { rows: [], restore: true })
    const update = lacking(this.acknowledged, relay)
    this.send({ kind: 'restore', channel: this.channel, id, update })
  }

  private merged(update: Uint8Array, lsn: number): void {
    const log = this.cursor?.log ?? ''
    if (!this.take(update, { log, lsn })) {
      this.send({
        kind: 'pull',
        channel: this.channel,
        stateVector: encodeStateVector(this.known)
      })
    }
  }

  /** Merge what is durable at the relay; whether everything that it builds on is here. */
  private take(update: Uint8Array, cursor: Cursor): boolean {
    const { from } = clocksOf(update)
    for (const [client, clock] of from) if ((this.known.get(client) ?? 0) < clock) return false
    const before = this.document.lacks
    this.document.apply(update)
    if (this.document.lacks && !before) {
      // Yjs holds it back until the rest comes. It must not, or the rest would be asked for of a
      // state that is not shown.
      this.rebuild()
      return false
    }
    const behind =
      this.cursor !== null && this.cursor.log === cursor.log && cursor.lsn < this.cursor.lsn
    if (!behind) this.cursor = cursor
    if (from.size > 0 || !isEmpty(update)) this.acknowledge(update)
    this.port.keep([{ step: 'append', update, cursor }], false)
    if (this.withdrawn) this.compact()
    return true
  }

  private acknowledge(update: Uint8Array): void {
    for (const [client, clock] of clocksOf(update).from) {
      if ((this.known.get(client) ?? 0) < clock) return // another tab's; it comes as a change
    }
    this.acknowledged.push(update)
    this.learn(update)
    // The first is what a tail is measured by: a whole document that just came is no reason to put
    // it together with the first word behind it.
    if (this.acknowledged.length > 1) this.tailBytes += update.length
    const [first] = this.acknowledged
    if (this.tailBytes > Math.max(TAIL_BYTES_MIN, first?.length ?? 0)) this.compact()
  }

  private learn(update: Uint8Array): void {
    for (const [client, clock] of clocksOf(update).to) {
      this.known.set(client, Math.max(clock, this.known.get(client) ?? 0))
    }
  }

  /** Put the acknowledged part together; what was withdrawn goes from memory and disk. */
  compact(): void {
    this.acknowledged = [compacted(this.acknowledged)]
    this.tailBytes = 0
    this.withdrawn = false
    this.port.compact()
  }

  // -- sending ---------------------------------------------------------------------------------

  private send(frame: FromClient): void {
    this.port.send(frame)
  }

  /** Send what waits, if it may. */
  private flush(): void {
    if (this.standing !== 'open' || this.paused) return
    const flying = new Set([...this.flights.values()].flatMap(one => one.rows.map(row => row.id)))
    for (const row of this.outbox) {
      if (this.flights.size >= IN_FLIGHT_MAX) return
      if (flying.has(row.id)) continue
      if (this.sent.has(row.id)) this.once.delete(row.id)
      else this.once.add(row.id)
      this.sent.add(row.id)
      this.sendUpdate([row], row.update)
    }
  }

  private sendUpdate(rows: readonly Row[], update: Uint8Array): void {
    const id = this.nextId++
    this.flights.set(id, { rows, restore: false })
    this.send({ kind: 'update', channel: this.channel, id, update })
  }

  /** The pause after a refusal for now is over. */
  resume(): void {
    this.paused = false
    this.flush()
  }

  private acked(id: number, lsn: number): void {
    const rows: Row[] = []
    for (const [flight, { rows: carried }] of this.flights) {
      if (flight > id) continue
      this.flights.delete(flight)
      rows.push(...carried)
    }
    this.gaps = 0
    const [first] = rows
    if (rows.length === 1 && first && this.cursor?.lsn === lsn - 1 && this.once.has(first.id)) {
      // One write that cannot have been known made one line of the log: the next one. Of several,
      // or of one sent again, others' writes may lie in between.
      this.cursor = { ...this.cursor, lsn }
    }
    this.settle(rows)
    this.flush()
  }

  /** These rows are durable at the relay. */
  private settle(rows: readonly Row[]): void {
    const ids = new Set(rows.map(row => row.id))
    const settled = this.outbox.filter(row => ids.has(row.id))
    if (settled.length === 0) return
    this.outbox = this.outbox.filter(row => !ids.has(row.id))
    const steps: Step[] = []
    for (const row of settled) {
      this.sent.delete(row.id)
      this.once.delete(row.id)
      this.acknowledge(row.update)
      steps.push({ step: 'append', update: row.update, cursor: null })
      steps.push({ step: 'drop', row: row.id })
    }
    this.count()
    this.port.keep(steps, true)
    this.port.settled([...ids], false)
    this.announce(settled.flatMap(row => entriesOf(row.intent)))
    if (settled.some(row => row.intent.kind === 'redact')) this.compact()
    this.port.status()
  }

  private nacked(nack: Nack): void {
    const flight = this.flights.get(nack.id)
    if (flight === undefined) return // its row was composed again, or is sent again, meanwhile
    this.flights.delete(nack.id)
    switch (nack.code) {
      case 'gap':
        this.flights = new Map()
        return this.fillGap(nack.stateVector ?? Uint8Array.of(0))
      case 'rate-limited':
      case 'unavailable':
        // What was sent behind it has a gap now, or is judged again as known.
        this.flights = new Map()
        this.paused = true
        this.port.resumeIn(nack.retryMs ?? RETRY_MS)
        return
      default:
        if (!flight.restore) return this.refuse(flight.rows, nack)
        // It takes nothing else either then. What waits stays here, and is tried again with the next
        // connection.
        this.flights = new Map()
        this.paused = true
        this.problem = nack.reason
        return this.port.status()
    }
  }

  /** The relay lacks what a row builds on. Three ways, each farther than the last. */
  private fillGap(relay: Uint8Array): void {
    this.gaps++
    if (this.gaps === 1) {
      if (!covers(decodeStateVector(relay), this.known)) this.restore(relay)
      return this.flush()
    }
    if (this.gaps === 2) return this.sendUpdate([...this.outbox], this.document.diff(relay))
    this.giveUp('the relay still lacks something that is here')
  }

  private giveUp(reason: string): void {
    this.problem = reason
    this.send({ kind: 'leave', channel: this.channel })
    this.detach()
    this.port.stuck(reason)
  }

  /** These rows are refused for good. */
  private refuse(rows: readonly Row[], nack: Nack): void {
    if (rows.length > 1) {
      // Which of them it was is not said: each goes alone now, without what other tabs wrote.
      if (this.alone) return this.giveUp(nack.reason)
      this.alone = true
      return this.mend()
    }
    this.gaps = 0
    const ids = new Set(rows.map(row => row.id))
    const lost = this.outbox.filter(row => ids.has(row.id))
    this.outbox = this.outbox.filter(row => !ids.has(row.id))
    if (lost.some(row => row.intent.kind === 'create')) {
      // Without its birth nothing of a conversation can be written.
      lost.push(...this.outbox)
      this.outbox = []
    }
    const steps: Step[] = []
    for (const row of lost) {
      const refused: RefusedRow = {
        id: row.id,
        intent: row.intent,
        code: nack.code,
        rule: nack.rule,
        reason: nack.reason,
        at: this.environment.now()
      }
      this.refused.push(refused)
      steps.push({ step: 'drop', row: row.id }, { step: 'refuse', refused })
    }
    this.port.keep(steps, true)
    this.port.settled(
      lost.map(row => row.id),
      true
    )
    this.mend()
    this.port.refused()
    this.port.status()
  }

  /** What is under way builds on what was refused, or is known to the relay when it comes again. */
  private mend(): void {
    this.flights = new Map()
    this.rebuild()
    this.flush()
  }

  private announce(entries: readonly string[]): void {
    if (entries.length === 0) return
    this.port.changed({
      entries: new Set(entries),
      structure: false,
      meta: false,
      withdrawn: false
    })
  }

  // -- presence --------------------------------------------------------------------------------

  /** Say that this device is here; again from time to time. */
  introduce(): void {
    if (this.standing !== 'open') return
    const { device } = this.author()
    const client = this.document.clientId
    const state = { device }
    this.presenceClock++
    this.peers.set(client, { clock: this.presenceClock, state })
    this.send({
      kind: 'presence',
      channel: this.channel,
      states: [{ client, clock: this.presenceClock, json: JSON.stringify(state) }]
    })
    this.port.presence()
  }

  private goodbye(client: number): AwarenessState {
    this.presenceClock++
    return { client, clock: this.presenceClock, json: null }
  }

  private hearPresence(states: readonly AwarenessState[]): void {
    for (const { client, clock, json } of states) {
      if (client === this.document.clientId) continue // who is here knows best
      const known = this.peers.get(client)
      if (json === null) this.peers.delete(client)
      else if (known === undefined || clock > known.clock) {
        this.peers.set(client, { clock, state: JSON.parse(json) })
      }
    }
    this.port.presence()
  }

  // -- the end ---------------------------------------------------------------------------------

  /** Take leave of the relay, and let go of the memory. */
  close(): void {
    if (this.standing === 'open' || this.standing === 'opening') {
      this.send({ kind: 'leave', channel: this.channel })
    }
    this.detach()
    this.document.destroy()
  }

  /** Everything acknowledged and written here, as one update; for exports and tests. */
  everything(): Uint8Array {
    return this.document.diff()
  }

  /** The state vector of the acknowledged part. */
  get acknowledgedVector(): StateVector {
    return this.known
  }
}

const isEmpty = (update: Uint8Array): boolean =>
  update.length === EMPTY_UPDATE.length && update.every((byte, i) => byte === EMPTY_UPDATE[i])

/** Whether a row's bytes can be taken as they are by who has just what the document has. */
const stands = (document: Document, row: Row): boolean => {
  const here = document.stateVector()
  for (const [client, clock] of clocksOf(row.update).from) {
    if ((here.get(client) ?? 0) < clock) return false
  }
  const after = afterOf(row.intent)
  return after === ROOT || document.tree.has(after)
}

/** Whether a relay with this state vector has an update. One that only deletes does not tell. */
const isCovered = (update: Uint8Array, relay: StateVector): boolean => {
  const { to } = clocksOf(update)
  return to.size > 0 && covers(relay, to)
}

const DOINGS: readonly unknown[] = ['idle', 'prefilling', 'generating', 'queued']

const readPresence = (client: number, state: unknown, self: boolean): Presence => {
  const given = isRecord(state) ? state : {}
  const node = isRecord(given.node) ? given.node : null
  const count = (value: unknown): number =>
    typeof value === 'number' && value >= 0 ? Math.trunc(value) : 0
  return {
    client,
    self,
    device: typeof given.device === 'string' ? given.device : '',
    node: node && {
      model: typeof node.model === 'string' ? node.model : '',
      doing: DOINGS.includes(node.doing)
        ? (node.doing as 'idle' | 'prefilling' | 'generating' | 'queued')
        : 'idle',
      warm: count(node.warm),
      tokens: count(node.tokens),
      queue: count(node.queue)
    }
  }
}

const isRecord = (value: unknown): value is Record<string, unknown> =>
  value !== null && typeof value === 'object' && !Array.isArray(value)

/** An error for whoever waits on a conversation that the relay does not let in. */
export const closedError = (closed: { code: number; reason: string }): ProviderError =>
  new ProviderError('refused', closed.reason, String(closed.code))
