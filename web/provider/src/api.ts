/**
 * What a program does with conversations, as types: the contract between this package and a page.
 *
 * This module owns words and promises, no code. It must not know how any of it is done: neither
 * Yjs, nor frames, nor IndexedDB appear here.
 *
 * Everything works offline. A write is shown at once, kept on this device, and travels when there
 * is a connection. Reading never waits.
 */

/** Ends a subscription. Calling it again does nothing. */
export type Unsubscribe = () => void

/** Who speaks in an entry. */
export type Role = 'system' | 'user' | 'assistant' | 'tool'

/** Where a slot (a request for a reply, and the place for it) stands. */
export type State = 'streaming' | 'done' | 'stopped' | 'failed' | 'superseded'

/** What a principal may do in a conversation. */
export type Grant = 'owner' | 'writer' | 'reader'

/** What a slot may ask of the sampler; what is absent is up to the node. */
export interface Params {
  /** Tokens, 1 to 1,000,000. */
  readonly max_tokens?: number
  /** 0 to 100. */
  readonly temperature?: number
  /** 0 to 1. */
  readonly top_p?: number
  /** 0 is off. */
  readonly top_k?: number
  readonly seed?: number
  /** At most 16 texts of 1 to 200 characters. */
  readonly stop?: readonly string[]
  readonly ignore_eos?: boolean
}

/** What an author said of an entry, once. */
export interface Born {
  readonly role: Role
  readonly author: string
  readonly device: string
  /** Ms since 1970, by the author's clock. */
  readonly at: number
  readonly clock: number
  readonly fork: boolean
  /** The entry it was written after; `''` is the beginning. */
  readonly after: string
  readonly params: Params & { readonly extend?: boolean }
  /** In a `tool` entry the id of the call that it answers. */
  readonly call: string | null
  /** In a summary the first and the last entry that it stands for. */
  readonly covers: readonly [string, string] | null
}

/** What a reply cost. Tokens and milliseconds; `null` is unknown. */
export interface Usage {
  readonly prompt: number
  readonly prefilled: number
  /** `prompt - prefilled`: prompt tokens that were not computed again. */
  readonly reused: number
  readonly drafted: number
  readonly sampled: number
  readonly ttft_ms: number | null
  readonly total_ms: number | null
  readonly finish: string | null
  readonly error: { readonly code: string; readonly message: string } | null
}

/** What a replica holds in proof of an admitted entry. */
export interface Proof {
  readonly content: Uint8Array | null
  readonly tokens: Uint8Array | null
  readonly calls: Uint8Array | null
  readonly digest: Uint8Array
  readonly signature: Uint8Array
}

/**
 * How an entry stands, for display:
 *
 * - `unsent`: written on this device, not yet durable at the relay;
 * - `pending`: durable, not yet admitted by the node (a slot: nobody answers yet);
 * - `streaming`: a reply is growing;
 * - `settled`: admitted, and nothing will be added;
 * - `stopped`, `failed`: a reply that ended early; its partial text stays;
 * - `superseded`: a request that a later one on the same line took over;
 * - `redacted`: withdrawn; show a fixed marker.
 */
export type Standing =
  | 'unsent'
  | 'pending'
  | 'streaming'
  | 'settled'
  | 'stopped'
  | 'failed'
  | 'superseded'
  | 'redacted'

/**
 * One contribution, as this replica reads it at one moment. Immutable; as long as nothing about the
 * entry changes, {@link Conversation.entry} gives the same object.
 */
export interface Entry {
  readonly id: string
  readonly born: Born
  /** Its text; of a reply what there is of it; `''` once redacted. */
  readonly content: string
  readonly standing: Standing
  /** Whether it is a request for a reply, and the reply (`born.role` is `assistant`). */
  readonly isSlot: boolean
  /** The raw state of a slot; `null` for one that was not begun, and for other entries. */
  readonly state: State | null
  /** Who asked for the end of the reply. */
  readonly stop: string | null
  readonly place: { readonly parent: string; readonly epoch: number } | null
  readonly usage: Usage | null
  readonly calls: readonly unknown[] | null
  readonly reads: readonly string[] | null
  readonly proof: Proof | null
  readonly salt: Uint8Array | null
  readonly redacted: { readonly by: string; readonly at: number } | null
}

/** How the node treats a conversation. */
export interface Policy {
  /** Whether the node asks for a reply to every user entry by itself. */
  readonly reply: 'ask' | 'auto'
  /** What an entry that comes during a reply does to it. */
  readonly on_new_entry: 'queue' | 'interrupt'
  /** What happens when the context is full. */
  readonly overflow: 'refuse' | 'drop_oldest' | 'summarise'
  readonly reasoning: 'hidden' | 'visible'
}

/** The conversation's own facts. */
export interface Meta {
  readonly title: string
  /** Ms since 1970. */
  readonly createdAt: number | null
  /** Which branch everybody is shown by default; `''` is the main line. */
  readonly head: string
  readonly model: string | null
  readonly policy: Policy
  /** Who made it; always an owner. `null` while this replica has nothing of it. */
  readonly owner: string | null
}

/** One line of a conversation's tree. */
export interface Branch {
  /** Its last entry; give it to {@link Conversation.look} or {@link Conversation.setHead}. */
  readonly tip: string
  /** The entry that it begins with; `''` for the main line. */
  readonly first: string
  /** The entry that it leaves another line after; `''` for the main line. */
  readonly parent: string
  /** Whether this device looks at it. */
  readonly shown: boolean
}

/** A write that the relay refused for good, kept on this device as a draft. */
export interface RefusedWrite {
  readonly id: string
  /** What it was. */
  readonly kind: 'create' | 'entry' | 'request' | 'stop' | 'redact' | 'meta' | 'access'
  /** The text that would be lost; `''` where there is none. */
  readonly text: string
  /** `denied`, `invalid` or `too-large`. */
  readonly code: string
  /** The rule that was broken, as `protocol/SCHEMA.md` names it; may be empty. */
  readonly rule: string
  /** One line for people. */
  readonly reason: string
  /** Ms since 1970. */
  readonly at: number
}

/** What the node says of itself. */
export interface NodePresence {
  readonly model: string
  readonly doing: 'idle' | 'prefilling' | 'generating' | 'queued'
  /** Tokens of the conversation that are resident. */
  readonly warm: number
  readonly tokens: number
  /** Its position in the node's queue. */
  readonly queue: number
}

/** Who is in a conversation now. Never a promise: a lost connection takes its presence along. */
export interface Presence {
  readonly client: number
  /** The device's name; `''` for the node. */
  readonly device: string
  readonly node: NodePresence | null
  /** Whether that is this very conversation on this device. */
  readonly self: boolean
}

/** How a conversation stands towards the relay. */
export interface ConversationStatus {
  /**
   * - `offline`: not connected; everything works on;
   * - `syncing`: connected, on the way to;
   * - `synced`: this replica has everything durable, and hears of what comes;
   * - `refused`: the relay does not let this conversation in (see `code`, `reason`); still readable.
   */
  readonly state: 'offline' | 'syncing' | 'synced' | 'refused'
  /** Own writes that are not yet durable at the relay. */
  readonly unsent: number
  /** What this principal may do; `null` if nothing, or if it is not known yet. */
  readonly grant: Grant | null
  /** The relay lost something that was admitted and waits for a replica that has it. */
  readonly behind: boolean
  /** With `refused` the close code, 4400 to 4499; else `null`. */
  readonly code: number | null
  /** Why it is refused, or why what is unsent stays so although it is synced; else `''`. */
  readonly reason: string
}

/** What changed in a conversation, for a page that renders only that. */
export interface Change {
  /** Entries that are new, or of which anything changed (text, state, standing). */
  readonly entries: ReadonlySet<string>
  /** Whether the view, the branches or the siblings of an entry may be others now. */
  readonly structure: boolean
  /** Whether title, head, policy, model or access changed. */
  readonly meta: boolean
}

/** What {@link Conversation.verify} found of one admitted entry. */
export interface Verdict {
  readonly entry: string
  /** Its chain digest; `null` if it has none. */
  readonly digest: Uint8Array | null
  /** `null` where all holds, else what does not, as a line for people. */
  readonly problem: string | null
}

/** The events of a {@link Conversation} and what listeners are given. */
export interface ConversationEvents {
  change: Change
  status: ConversationStatus
  presence: readonly Presence[]
  refused: readonly RefusedWrite[]
}

/** Where an entry is written. */
export interface WriteOptions {
  /**
   * The entry to write after; by default the end of the line that this device looks at. An entry
   * that is not the end of its line begins a branch.
   */
  readonly after?: string
}

/**
 * One conversation on this device. The object stays the same for as long as it is open, whatever
 * becomes of the replica behind it.
 *
 * Writing methods answer once the write is kept on this device; the view shows it before that.
 * They throw {@link ProviderError} (code `misuse`) for what no relay would take.
 */
export interface Conversation {
  readonly id: string
  readonly meta: Meta
  /** Everybody with a right, the birth's owner included. */
  readonly access: ReadonlyMap<string, Grant>
  readonly status: ConversationStatus
  readonly presence: readonly Presence[]
  readonly refused: readonly RefusedWrite[]
  /** Whether nothing of it is here yet (it is being fetched, or does not exist). */
  readonly isEmpty: boolean

  // -- reading ---------------------------------------------------------------------------------

  /** One entry, or `undefined`. O(1). */
  entry(id: string): Entry | undefined
  /** The ids of what this device shows, in order. The same array until the order changes. */
  view(head?: string): readonly string[]
  /** The entries of {@link view}. */
  entries(head?: string): readonly Entry[]
  /** Every line of the conversation, the main line first. */
  branches(): readonly Branch[]
  /** The alternatives that stand in the place of an entry, itself included, in order. */
  siblings(id: string): readonly string[]
  /** Where this device looks: an entry, or `null` for where the shared head is. */
  readonly looking: string | null
  /** Look at the line of another entry, on this device alone; `null` follows the shared head. */
  look(head: string | null): void

  // -- writing ---------------------------------------------------------------------------------

  /** Add an entry without asking for a reply. Answers its id. */
  send(text: string, options?: WriteOptions & { role?: 'user' | 'system' }): Promise<string>
  /** Add an entry and ask for a reply to it. Answers the ids of both. */
  ask(
    text: string,
    options?: WriteOptions & { params?: Params }
  ): Promise<{ entry: string; slot: string }>
  /** Ask for a reply to what is the end of the line. Answers the slot's id. */
  request(options?: WriteOptions & { params?: Params }): Promise<string>
  /** Ask again for a reply: a branch beside `slot`, with its parameters but for the seed. */
  regenerate(slot: string, params?: Params): Promise<string>
  /** Say an entry anew as a branch beside it, and ask for a reply. */
  edit(id: string, text: string, params?: Params): Promise<{ entry: string; slot: string }>
  /** Go on after a reply that was cut. Answers the new slot's id. */
  continue(slot: string, params?: Params): Promise<string>
  /** Ask for the end of a reply. */
  stop(slot: string): Promise<void>
  /** Withdraw an entry: its text goes from every replica. */
  redact(id: string): Promise<void>
  rename(title: string): Promise<void>
  /** Set which branch everybody is shown by default; `null` is the main line. */
  setHead(head: string | null): Promise<void>
  /** Give a principal a right, or take it away with `null`. Owners only. */
  share(principal: string, grant: Grant | null): Promise<void>
  /** Change the policy; keys that are left out stay. */
  setPolicy(policy: Partial<Policy>): Promise<void>
  setModel(model: string | null): Promise<void>
  /** Give up one's own right (not for who made the conversation). */
  leave(): Promise<void>

  // -- while typing ----------------------------------------------------------------------------

  /**
   * Say what is being typed, so that the node can read ahead; call it on every input event. It
   * reaches the node alone and is never stored. `''` drops it. Rate-limited here.
   */
  typing(text: string): void
  /** Whether hints of what is typed leave this device. Begins as {@link ClientOptions.hints}. */
  hints: boolean

  // -- refused writes --------------------------------------------------------------------------

  /** Forget a refused write. */
  discard(refused: string): Promise<void>
  /** Write it again, as a new write at the end of the line. */
  resend(refused: string): Promise<void>

  // -- checking and taking away ----------------------------------------------------------------

  /**
   * Recompute the chain along the view. Ends before the first entry without a proof; the last
   * verdict may be a problem.
   */
  verify(head?: string): Promise<readonly Verdict[]>
  /** The sealed blobs of a reply, for whoever has the key (`protocol/SCHEMA.md`, section 8). */
  sealed(id: string): readonly Uint8Array[]
  /** The whole conversation as JSON, or what is shown as Markdown. */
  export(format: 'json' | 'markdown'): string

  on<Name extends keyof ConversationEvents>(
    event: Name,
    listener: (value: ConversationEvents[Name]) => void
  ): Unsubscribe
  /** Resolves when the relay has everything that was written here so far. */
  settled(): Promise<void>
  /** Resolves when this replica has heard from the relay once; rejects if it is refused. */
  synced(): Promise<void>
  /** Stop taking part. What is unsent stays on this device and is sent when it is opened again. */
  close(): Promise<void>
}

/** A conversation in the list of a principal. */
export interface Listed {
  readonly id: string
  readonly title: string
  /** `null` if it was made here and the relay has not heard of it yet. */
  readonly role: Grant | null
  readonly owner: string
  readonly createdAt: number
  readonly changedAt: number
  readonly archived: boolean
}

/** How a client stands towards its relay. */
export interface ClientStatus {
  /**
   * - `offline`: not connected; the next try is at `retryAt`, or when the network comes back;
   * - `connecting`;
   * - `online`: the relay knows who this is;
   * - `refused`: for good, until {@link Client.setToken} or {@link Client.retry}; see `code`;
   * - `closed`: {@link Client.close} was called.
   */
  readonly state: 'offline' | 'connecting' | 'online' | 'refused' | 'closed'
  /** Who the token stands for; known from an earlier connection while offline. */
  readonly principal: string | null
  /** Ms since 1970; when the next connection is tried, if that is planned. */
  readonly retryAt: number | null
  /** When the token ends, ms since 1970; `null` if it does not, or is not known. */
  readonly expiresAt: number | null
  /** Close code of the last connection, or a 44xx with `refused`; `null` at first. */
  readonly code: number | null
  readonly reason: string
}

/** Why storage on this device does not work; the conversation goes on without it. */
export interface StoreProblem {
  readonly reason: string
}

/** The events of a {@link Client} and what listeners are given. */
export interface ClientEvents {
  status: ClientStatus
  list: readonly Listed[]
  /** The disk did not take something: until it does, a reload may lose unsent writes. */
  store: StoreProblem
}

/** What an owner hands to somebody who shall join. */
export interface Invitation {
  readonly conversation: string
  readonly principal: string
  readonly token: string
  /** For {@link Client.revoke}. */
  readonly id: string
}

/** What {@link openClient} is told. Everything outside is an argument. */
export interface ClientOptions {
  /** Address of the relay: `ws(s)://host:port/` or `http(s)://`. Tokens never go in it. */
  readonly url: string
  /** Who we are; sent in the first frame. A function is asked again when a token runs out. */
  readonly token: string | (() => string | Promise<string>)
  /** This device's name, for the people who share the conversation. At most 200 characters. */
  readonly device?: string
  /** Keeps data of several accounts in one browser apart. */
  readonly profile?: string
  /** The principal, if it is known; else it is what the relay said last, or the token says. */
  readonly principal?: string
  /** Where replicas are kept: by default IndexedDB, and memory where there is none. */
  readonly store?: import('./store.js').Store
  /** Locks and messages between tabs: by default Web Locks and BroadcastChannel. */
  readonly tabs?: import('./tabs.js').Tabs
  /** Opens sockets; by default the global `WebSocket`. */
  readonly socket?: import('./connection.js').SocketFactory
  /** Whether hints of what is typed leave this device. Default true. */
  readonly hints?: boolean
  /** Begin without connecting; {@link Client.retry} connects. */
  readonly offline?: boolean
}

/** A principal's conversations on this device, and the connection to a relay. */
export interface Client {
  readonly status: ClientStatus
  /** All conversations of this principal, last changed first; kept for offline use. */
  readonly list: readonly Listed[]

  /** Begin a conversation. Needs no connection. */
  create(options?: {
    title?: string
    policy?: Partial<Policy>
    model?: string
  }): Promise<Conversation>
  /** Open one: from this device at once, in sync in the background. Twice gives the same object. */
  open(id: string): Promise<Conversation>
  /** Put a conversation out of sight, or back. Needs a connection. */
  archive(id: string, archived: boolean): Promise<void>
  /** A token for somebody new; also writes the right into the document. Needs a connection. */
  invite(
    id: string,
    options: { role: 'writer' | 'reader'; name?: string; expiresAt?: number }
  ): Promise<Invitation>
  /** End a token that was given out. Needs a connection. */
  revoke(invitation: string): Promise<void>
  /** Delete what this device keeps of a conversation, unsent writes included. */
  forget(id: string): Promise<void>

  /** Go on with another token of the same principal. */
  setToken(token: string): void
  /** Try to connect now, also after `refused`. */
  retry(): void
  /** Leave the network until {@link retry}. */
  disconnect(): void

  on<Name extends keyof ClientEvents>(
    event: Name,
    listener: (value: ClientEvents[Name]) => void
  ): Unsubscribe
  /** Save what waits for that, and end. */
  close(): Promise<void>
}
