/**
 * Several tabs of one browser: which of them are alive, and what they tell each other.
 *
 * This module owns locks and messages between tabs. It must not know what the messages say, or what
 * anybody does for a tab that is gone.
 *
 * Every tab has a connection, a client id and an outbox of its own; nothing is elected and nothing is
 * handed over while a tab lives. It holds a lock under its name for as long. Whoever can have that
 * lock knows that the tab is gone, and may adopt what it left unsent.
 */

import type { Row } from './store.js'

/** What tabs tell each other. */
export type Message =
  /** A tab wrote something. */
  | { readonly kind: 'wrote'; readonly conversation: string; readonly rows: readonly Row[] }
  /** What a tab wrote is durable at the relay, or was refused and must go. */
  | {
      readonly kind: 'settled'
      readonly conversation: string
      readonly rows: readonly string[]
      readonly refused: boolean
    }
  /** A tab ends; what it left unsent may be adopted. */
  | { readonly kind: 'gone'; readonly tab: string }

/** The tabs that share a store. */
export interface Tabs {
  /** The name of this one. */
  readonly tab: string
  /** Whether another tab is certainly gone. */
  isGone(tab: string): Promise<boolean>
  post(message: Message): void
  /** Begin to listen. Not called for what this tab posts itself. */
  listen(listener: (message: Message) => void): void
  close(): void
}

/** A tab alone with its store: every other name is of a process that ended. */
export const loneTab = (tab: string): Tabs => ({
  tab,
  isGone: async other => other !== tab,
  post: () => undefined,
  listen: () => undefined,
  close: () => undefined
})

/**
 * The tabs of this browser, by Web Locks and BroadcastChannel.
 *
 * Where there are no locks (a page without TLS that is not on this machine) a tab counts as gone once
 * it says so, or when another one starts: then two may send the same rows, which relays take as the
 * same write.
 *
 * @param name What is shared: that of the store.
 * @param tab The name of this tab, never used before.
 */
export const browserTabs = (name: string, tab: string): Tabs => {
  if (typeof BroadcastChannel === 'undefined') return loneTab(tab)
  const channel = new BroadcastChannel(name)
  const locks = typeof navigator === 'undefined' ? undefined : navigator.locks
  const lockOf = (one: string): string => `${name} ${one}`
  let release: () => void = () => undefined
  const held = new Promise<void>(resolve => {
    release = resolve
  })
  void locks?.request(lockOf(tab), () => held)
  const gone = (): void => channel.postMessage({ kind: 'gone', tab } satisfies Message)
  globalThis.addEventListener?.('pagehide', gone)
  return {
    tab,
    isGone: async other => {
      if (other === tab) return false
      if (locks === undefined) return true
      return locks.request(lockOf(other), { ifAvailable: true }, lock => lock !== null)
    },
    post: message => channel.postMessage(message),
    listen: listener => {
      channel.onmessage = ({ data }: MessageEvent<Message>) => listener(data)
    },
    close: () => {
      globalThis.removeEventListener?.('pagehide', gone)
      gone()
      release()
      channel.close()
    }
  }
}
