// Conversations as signals: what a component reads, it is drawn again for, and for nothing else. This
// module owns how changes are gathered: a frame of the screen at a time, however many came.

import { batch, type ReadonlySignal, type Signal, signal } from '@preact/signals'
import type {
  Change,
  Client,
  ClientStatus,
  Conversation,
  ConversationStatus,
  Entry,
  Grant,
  Listed,
  Meta,
  Presence,
  RefusedWrite,
  Unsubscribe
} from 'crdt-llm-provider'

/** Before the next frame is drawn; in a tab that is not shown, where no frame is, soon. */
function soon(act: () => void): void {
  if (document.hidden) setTimeout(act, 100)
  else requestAnimationFrame(act)
}

export class LiveConversation {
  readonly path: ReadonlySignal<readonly string[]>
  readonly meta: ReadonlySignal<Meta>
  readonly access: ReadonlySignal<ReadonlyMap<string, Grant>>
  readonly status: ReadonlySignal<ConversationStatus>
  readonly presence: ReadonlySignal<readonly Presence[]>
  readonly refused: ReadonlySignal<readonly RefusedWrite[]>
  /** Grows with every change of the tree's shape. */
  readonly structure: ReadonlySignal<number>

  readonly #entries = new Map<string, Signal<Entry | undefined>>()
  readonly #subscriptions: readonly Unsubscribe[]
  readonly #changed = new Set<string>()
  readonly #path: Signal<readonly string[]>
  readonly #meta: Signal<Meta>
  readonly #access: Signal<ReadonlyMap<string, Grant>>
  readonly #structure = signal(0)
  #changes = { structure: false, meta: false }
  #isFlushing = false

  constructor(readonly on: Conversation) {
    this.path = this.#path = signal(on.view())
    this.meta = this.#meta = signal(on.meta)
    this.access = this.#access = signal(on.access)
    this.structure = this.#structure
    const status = signal(on.status)
    const presence = signal(on.presence)
    const refused = signal(on.refused)
    this.status = status
    this.presence = presence
    this.refused = refused
    this.#subscriptions = [
      on.on('change', change => this.#note(change)),
      on.on('status', value => {
        status.value = value
      }),
      on.on('presence', value => {
        presence.value = value
      }),
      on.on('refused', value => {
        refused.value = value
      })
    ]
  }

  entry(id: string): ReadonlySignal<Entry | undefined> {
    let known = this.#entries.get(id)
    if (known === undefined) {
      known = signal(this.on.entry(id))
      this.#entries.set(id, known)
    }
    return known
  }

  /** Shows another branch on this device; `null` follows what everyone is shown. */
  look(head: string | null): void {
    this.on.look(head)
    this.#note({ entries: new Set(), structure: true, meta: false })
  }

  release(): void {
    for (const end of this.#subscriptions) end()
  }

  #note(change: Change): void {
    for (const id of change.entries) this.#changed.add(id)
    this.#changes.structure ||= change.structure
    this.#changes.meta ||= change.meta
    if (this.#isFlushing) return
    this.#isFlushing = true
    soon(() => this.#flush())
  }

  #flush(): void {
    const { structure, meta } = this.#changes
    this.#isFlushing = false
    this.#changes = { structure: false, meta: false }
    batch(() => {
      for (const id of this.#changed) {
        const known = this.#entries.get(id)
        if (known !== undefined) known.value = this.on.entry(id)
      }
      this.#changed.clear()
      if (structure) {
        this.#path.value = this.on.view()
        this.#structure.value += 1
      }
      if (meta) {
        this.#meta.value = this.on.meta
        this.#access.value = this.on.access
      }
    })
  }
}

export class LiveClient {
  readonly status: ReadonlySignal<ClientStatus>
  readonly list: ReadonlySignal<readonly Listed[]>
  /** What storage on this device last said was wrong; `''` is nothing. */
  readonly storeProblem: ReadonlySignal<string>

  constructor(readonly on: Client) {
    const status = signal(on.status)
    const list = signal(on.list)
    const storeProblem = signal('')
    this.status = status
    this.list = list
    this.storeProblem = storeProblem
    on.on('status', value => {
      status.value = value
    })
    on.on('list', value => {
      list.value = value
    })
    on.on('store', value => {
      storeProblem.value = value.reason
    })
  }
}

/** Whether it is of use to write here: what the relay does not let in would never leave this device. */
export function mayWrite(live: LiveConversation): boolean {
  const { grant, state } = live.status.value
  return grant !== 'reader' && state !== 'refused'
}
