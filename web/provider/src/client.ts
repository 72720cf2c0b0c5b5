/**
 * A principal's conversations on this device, over one connection.
 *
 * This module owns which conversations are open, their channels, the list, and requests. It must not
 * know what is in a document, or how sockets, storage and tabs work: those are arguments.
 */

import type {
  Client,
  ClientEvents,
  ClientOptions,
  ClientStatus,
  Conversation,
  Invitation,
  Listed,
  Policy,
  Unsubscribe
} from './api.js'
import {
  browserSocket,
  Connection,
  type ConnectionStatus,
  principalOf,
  relayAddress
} from './connection.js'
import { checkedPolicy, checkedTitle, type Host, OpenConversation } from './conversation.js'
import { type Environment, realEnvironment, uniqueName } from './environment.js'
import { misuse, ProviderError } from './errors.js'
import { Listeners } from './events.js'
import {
  type Answer,
  CHANNEL_MAX,
  type FromClient,
  type FromRelay,
  type ListedFrame,
  NAME_CHARACTERS_MAX,
  type Plain,
  type Welcome
} from './frames.js'
import { IndexedDbStore } from './indexeddb.js'
import { characters, conversationId, isConversationId, NONCE_BYTES, readGrant } from './schema.js'
import { type Facts, MemoryStore, type Profile, type Store } from './store.js'
import { browserTabs, loneTab, type Message, type Tabs } from './tabs.js'

/** Presence is renewed this often; a relay lets it go after twice as long. */
const PRESENCE_MS = 15_000
/** The list waits so long for company before it is kept. */
const PROFILE_WINDOW_MS = 500
interface Asked {
  resolve(values: Plain): void
  reject(error: ProviderError): void
}

/** An open client. */
class OpenClient implements Client, Host {
  readonly device: string
  private readonly connection: Connection
  private readonly listeners = new Listeners<ClientEvents>()
  private readonly opening = new Map<string, Promise<OpenConversation>>()
  private readonly closing = new Map<string, Promise<void>>()
  private readonly openOnes = new Map<string, OpenConversation>()
  /** Opened only to send what they left unsent. */
  private readonly background = new Set<string>()
  private readonly channels = new Map<number, OpenConversation>()
  private lastChannel = 0
  private readonly asked = new Map<number, Asked>()
  private lastRequest = 0
  private list_: readonly Listed[] = []
  /** A whole list that is not complete yet. */
  private coming: Map<string, Facts> | null = null
  private said: ClientStatus
  private cancelSave: (() => void) | null = null
  private cancelPresence: (() => void) | null = null
  private readonly wake = (): void => this.connection.wake()
  private readonly hints: boolean

  constructor(
    options: ClientOptions,
    readonly environment: Environment,
    readonly store: Store,
    readonly tabs: Tabs,
    private profile: Profile
  ) {
    const { device = 'browser', token } = options
    if (device === '' || characters(device) > NAME_CHARACTERS_MAX) {
      throw misuse(`a device has a name of at most ${NAME_CHARACTERS_MAX} characters`)
    }
    this.device = device
    this.hints = options.hints ?? true
    const told = options.principal ?? (typeof token === 'string' ? principalOf(token) : null)
    if (profile.principal === null && told !== null) this.profile = { ...profile, principal: told }
    this.connection = new Connection(
      relayAddress(options.url),
      typeof token === 'string' ? () => token : token,
      device,
      environment,
      options.socket ?? browserSocket,
      {
        welcomed: welcome => this.welcomed(welcome),
        received: frame => this.received(frame),
        lost: () => this.lost(),
        status: status => this.statusChanged(status)
      }
    )
    this.said = this.currentStatus(this.connection.status)
    this.list_ = this.sorted()
    tabs.listen(message => this.hear(message))
    globalThis.addEventListener?.('online', this.wake)
    globalThis.addEventListener?.('offline', this.wake) // it may be wrong: try the line
    globalThis.document?.addEventListener('visibilitychange', this.wake)
    this.renewPresence()
    if (options.offline !== true) this.connection.connect()
  }

  // -- events ----------------------------------------------------------------------------------

  on<Name extends keyof ClientEvents>(
    event: Name,
    listener: (value: ClientEvents[Name]) => void
  ): Unsubscribe {
    return this.listeners.on(event, listener)
  }

  get status(): ClientStatus {
    return this.said
  }

  get list(): readonly Listed[] {
    return this.list_
  }

  get principal(): string | null {
    return this.profile.principal
  }

  get relayKey(): Uint8Array | null {
    return this.profile.relay
  }

  storeFailed(error: unknown): void {
    const reason = error instanceof Error ? error.message : String(error)
    this.listeners.tell('store', { reason })
  }

  private currentStatus(status: ConnectionStatus): ClientStatus {
    return { ...status, principal: this.profile.principal }
  }

  private statusChanged(status: ConnectionStatus): void {
    const cameOnline = status.state === 'online' && this.said.state !== 'online'
    this.said = this.currentStatus(status)
    if (cameOnline) this.online()
    this.listeners.tell('status', this.said)
  }

  // -- the connection --------------------------------------------------------------------------

  setToken(token: string): void {
    this.connection.setToken(() => token)
  }

  retry(): void {
    this.connection.connect()
    if (this.said.state !== 'online') return
    for (const one of this.openOnes.values()) {
      if (one.replica.standing === 'closed') this.attach(one)
    }
  }

  disconnect(): void {
    this.connection.disconnect()
  }

  send(frame: FromClient): void {
    this.connection.send(frame)
  }

  private welcomed({ principal, relay }: Welcome): string | null {
    const { principal: known, relay: pinned } = this.profile
    if (known !== null && known !== principal) {
      return `this profile keeps the data of ${known}, and the token is that of ${principal}`
    }
    if (pinned !== null && !pinned.every((byte, i) => byte === relay[i])) {
      return 'the relay has another key than at the first connection: it is not the same relay'
    }
    if (known === null || pinned === null) {
      this.profile = { ...this.profile, principal, relay }
      void this.saveNow() // a page that ends next can write offline when it comes again
    }
    return null
  }

  private online(): void {
    this.lastChannel = 0
    this.channels.clear()
    this.send({ kind: 'watch', on: true })
    for (const one of this.openOnes.values()) this.attach(one)
    void this.sendLeftovers()
  }

  private attach(one: OpenConversation): void {
    const channel = this.freeChannel()
    if (channel === null) return
    this.channels.set(channel, one)
    one.attach(channel)
  }

  private freeChannel(): number | null {
    for (let tries = 0; tries < CHANNEL_MAX; tries++) {
      this.lastChannel = (this.lastChannel % CHANNEL_MAX) + 1
      if (!this.channels.has(this.lastChannel)) return this.lastChannel
    }
    return null
  }

  reopen(one: OpenConversation): void {
    const isOpen = this.openOnes.get(one.id) === one
    if (isOpen && this.said.state === 'online' && one.replica.standing === 'detached') {
      this.attach(one)
    }
  }

  private lost(): void {
    this.channels.clear()
    this.coming = null
    for (const one of this.openOnes.values()) one.detach()
    const error = new ProviderError('offline', 'the connection was lost before the answer came')
    for (const asked of this.asked.values()) asked.reject(error)
    this.asked.clear()
  }

  private received(frame: FromRelay): void {
    if (frame.kind === 'listed') return this.listed(frame)
    if (frame.kind === 'answer') return this.answered(frame)
    if (!('channel' in frame)) return
    const one = this.channels.get(frame.channel)
    if (frame.kind === 'closed') this.channels.delete(frame.channel)
    if (one === undefined || one.replica.onChannel !== frame.channel) return // left meanwhile
    one.receive(frame)
    if (frame.kind === 'opened') {
      this.connection.synced()
      void this.adoptFor(one)
    }
  }

  private renewPresence(): void {
    this.cancelPresence = this.environment.later(PRESENCE_MS, () => {
      for (const one of this.openOnes.values()) one.replica.introduce()
      this.renewPresence()
    })
  }

  // -- conversations ---------------------------------------------------------------------------

  async create(
    options: { title?: string; policy?: Partial<Policy>; model?: string } = {}
  ): Promise<Conversation> {
    const owner = await this.whoWeAre()
    const nonce = this.environment.random(new Uint8Array(NONCE_BYTES))
    const id = conversationId(owner, nonce)
    const at = this.environment.now()
    const title = checkedTitle(options.title ?? '')
    const one = await this.load(id)
    const kept = one.write({
      kind: 'create',
      owner,
      nonce,
      at,
      title: title || null,
      model: options.model === undefined ? null : checkedTitle(options.model),
      policy: options.policy === undefined ? null : checkedPolicy(options.policy)
    })
    this.profile = {
      ...this.profile,
      local: new Map(this.profile.local).set(id, {
        title,
        role: null,
        owner,
        created_at: at,
        changed_at: at,
        archived: false
      })
    }
    this.listChanged()
    if (this.said.state === 'online') this.attach(one)
    await kept
    return one
  }

  private whoWeAre(): Promise<string> {
    return new Promise((resolve, reject) => {
      const look = ({ principal, state, reason }: ClientStatus): boolean => {
        if (principal !== null) resolve(principal)
        else if (state === 'refused') reject(new ProviderError('refused', reason))
        else if (state === 'closed') reject(misuse('this client is closed'))
        else return false
        return true
      }
      if (look(this.said)) return
      const stop = this.on('status', status => {
        if (look(status)) stop()
      })
    })
  }

  async open(id: string): Promise<Conversation> {
    if (!isConversationId(id)) throw misuse(`${id} is no conversation's id`)
    this.background.delete(id)
    return this.openOne(id)
  }

  private async openOne(id: string): Promise<OpenConversation> {
    const open = this.openOnes.get(id)
    if (open !== undefined) return open
    const one = await this.load(id)
    if (this.said.state === 'online' && one.replica.standing === 'detached') this.attach(one)
    return one
  }

  private load(id: string): Promise<OpenConversation> {
    if (this.said.state === 'closed') throw misuse('this client is closed')
    const known = this.opening.get(id)
    if (known !== undefined) return known
    const opening = this.loadNow(id).finally(() => this.opening.delete(id))
    this.opening.set(id, opening)
    return opening
  }

  private async loadNow(id: string): Promise<OpenConversation> {
    await this.closing.get(id) // what it kept last is to be read
    let kept = await this.store.load(id)
    const gone = await this.goneOf(kept.outbox.map(row => row.tab))
    if (gone.length > 0) {
      await this.store.adopt(id, gone, this.tabs.tab)
      kept = await this.store.load(id)
    }
    const one = new OpenConversation(id, kept, this, this.hints)
    this.openOnes.set(id, one)
    return one
  }

  private async goneOf(tabs: readonly string[]): Promise<string[]> {
    const others = [...new Set(tabs)].filter(tab => tab !== this.tabs.tab)
    const gone = await Promise.all(others.map(tab => this.tabs.isGone(tab)))
    return others.filter((_, i) => gone[i])
  }

  private async adoptFor(one: OpenConversation, gone?: readonly string[]): Promise<void> {
    try {
      const tabs = gone ?? (await this.goneOf(one.replica.otherTabs))
      if (tabs.length === 0) return
      one.replica.adopt(await this.store.adopt(one.id, tabs, this.tabs.tab))
    } catch (error) {
      this.storeFailed(error)
    }
  }

  /** Send what was written in conversations that nobody opened since. */
  private async sendLeftovers(): Promise<void> {
    try {
      for (const id of await this.store.waiting()) {
        if (this.openOnes.has(id) || this.opening.has(id)) continue
        this.background.add(id)
        const one = await this.openOne(id)
        const done = (): void => {
          if (this.background.delete(id)) void one.close()
        }
        one.settled().then(done, done)
      }
    } catch (error) {
      this.storeFailed(error)
    }
  }

  changed(one: OpenConversation): void {
    const { title } = one.meta
    const { local, listed } = this.profile
    const known = local.get(one.id) ?? listed.get(one.id)
    if (known === undefined || known.title === title) return
    const facts = { ...known, title, changed_at: this.environment.now() }
    this.profile = local.has(one.id)
      ? { ...this.profile, local: new Map(local).set(one.id, facts) }
      : { ...this.profile, listed: new Map(listed).set(one.id, facts) }
    this.listChanged()
  }

  closed(one: OpenConversation, kept: Promise<void>): void {
    this.closing.set(one.id, kept)
    void kept.finally(() => {
      if (this.closing.get(one.id) === kept) this.closing.delete(one.id)
    })
    if (this.openOnes.get(one.id) === one) this.openOnes.delete(one.id)
    this.background.delete(one.id)
  }

  async forget(id: string): Promise<void> {
    await this.openOnes.get(id)?.close()
    await this.store.forget(id)
    const local = new Map(this.profile.local)
    if (!local.delete(id)) return
    this.profile = { ...this.profile, local }
    this.listChanged()
  }

  // -- the list --------------------------------------------------------------------------------

  private listed({ whole, end, conversations }: ListedFrame): void {
    if (whole) this.coming ??= new Map()
    const listed = whole && this.coming ? this.coming : new Map(this.profile.listed)
    const local = new Map(this.profile.local)
    for (const [id, plain] of conversations) {
      if (plain === null) listed.delete(id)
      else listed.set(id, readFacts(plain))
      local.delete(id)
      const one = this.openOnes.get(id)
      if (plain !== null && one?.replica.standing === 'closed') this.attach(one) // let in again
    }
    if (whole && !end) return
    this.coming = null
    this.profile = { ...this.profile, listed, local }
    this.connection.synced()
    this.listChanged()
  }

  private listChanged(): void {
    this.list_ = this.sorted()
    this.save()
    this.listeners.tell('list', this.list_)
  }

  private sorted(): Listed[] {
    const all = new Map([...this.profile.local, ...this.profile.listed])
    return [...all]
      .map(([id, { created_at, changed_at, ...facts }]) => ({
        id,
        ...facts,
        createdAt: created_at,
        changedAt: changed_at
      }))
      .sort((a, b) => b.changedAt - a.changedAt || (a.id < b.id ? -1 : 1))
  }

  private save(): void {
    this.cancelSave ??= this.environment.later(PROFILE_WINDOW_MS, () => {
      this.cancelSave = null
      void this.saveNow()
    })
  }

  private async saveNow(): Promise<void> {
    try {
      await this.store.saveProfile(this.profile)
    } catch (error) {
      this.storeFailed(error)
    }
  }

  // -- requests --------------------------------------------------------------------------------

  private request(name: string, args: Plain): Promise<Plain> {
    if (this.said.state !== 'online') {
      return Promise.reject(new ProviderError('offline', 'this needs a connection to the relay'))
    }
    const id = ++this.lastRequest
    return new Promise((resolve, reject) => {
      this.asked.set(id, { resolve, reject })
      this.send({ kind: 'request', id, name, arguments: args })
    })
  }

  private answered({ id, values, code, reason }: Answer): void {
    const asked = this.asked.get(id)
    this.asked.delete(id)
    if (values !== null) asked?.resolve(values)
    else asked?.reject(new ProviderError('refused', reason || code, code))
  }

  async archive(id: string, archived: boolean): Promise<void> {
    await this.request('archive', { conversation: id, archived })
    const facts = this.profile.listed.get(id)
    if (facts === undefined || facts.archived === archived) return
    const listed = new Map(this.profile.listed).set(id, { ...facts, archived })
    this.profile = { ...this.profile, listed }
    this.listChanged()
  }

  async invite(
    id: string,
    options: { role: 'writer' | 'reader'; name?: string; expiresAt?: number }
  ): Promise<Invitation> {
    const {
      principal,
      token,
      id: jti
    } = await this.request('invite', {
      conversation: id,
      role: options.role,
      expires_at: options.expiresAt ?? null,
      name: options.name ?? null
    })
    if (typeof principal !== 'string' || typeof token !== 'string' || typeof jti !== 'string') {
      throw new ProviderError('malformed', 'the relay answered without an invitation')
    }
    const wasOpen = this.openOnes.has(id)
    const one = await this.openOne(id)
    await one.share(principal, options.role)
    await one.settled()
    if (!wasOpen) await one.close()
    return { conversation: id, principal, token, id: jti }
  }

  async revoke(invitation: string): Promise<void> {
    await this.request('revoke', { id: invitation })
  }

  // -- other tabs, and the end -----------------------------------------------------------------

  private hear(message: Message): void {
    if (message.kind === 'gone') {
      for (const one of this.openOnes.values()) {
        if (one.replica.otherTabs.includes(message.tab)) void this.adoptFor(one, [message.tab])
      }
      return
    }
    const one = this.openOnes.get(message.conversation)
    if (message.kind === 'wrote') one?.replica.hear(message.rows)
    else one?.replica.hearSettled(message.rows, message.refused)
  }

  async close(): Promise<void> {
    if (this.said.state === 'closed') return
    globalThis.removeEventListener?.('online', this.wake)
    globalThis.removeEventListener?.('offline', this.wake)
    globalThis.document?.removeEventListener('visibilitychange', this.wake)
    this.cancelPresence?.()
    this.cancelSave?.()
    await Promise.all([...this.openOnes.values()].map(one => one.close()))
    this.connection.close()
    this.tabs.close()
    await this.saveNow()
    await this.store.close()
  }
}

const readFacts = (plain: Plain): Facts => {
  const number = (value: unknown): number => (typeof value === 'number' ? value : 0)
  const text = (value: unknown): string => (typeof value === 'string' ? value : '')
  return {
    title: text(plain.title),
    role: readGrant(plain.role),
    owner: text(plain.owner),
    created_at: number(plain.created_at),
    changed_at: number(plain.changed_at),
    archived: plain.archived === true
  }
}

/**
 * Open this device's conversations and begin to connect.
 *
 * Where this browser's storage cannot be used everything is kept in memory, and the client's `store`
 * event says so.
 *
 * @throws ProviderError `misuse` for malformed options.
 */
export const openClient = async (
  options: ClientOptions,
  environment: Environment = realEnvironment
): Promise<Client> => {
  const name = `crdt-llm ${options.profile ?? 'default'} ${relayAddress(options.url)}`
  const tab = uniqueName(environment.random)
  let failure: unknown = null
  let store = options.store
  if (store === undefined && typeof indexedDB !== 'undefined') {
    try {
      store = await IndexedDbStore.open(name)
    } catch (error) {
      failure = error
    }
  }
  const tabs =
    options.tabs ?? (store instanceof IndexedDbStore ? browserTabs(name, tab) : loneTab(tab))
  const kept = store ?? new MemoryStore()
  const client = new OpenClient(options, environment, kept, tabs, await kept.profile())
  if (failure !== null) environment.later(0, () => client.storeFailed(failure))
  return client
}
