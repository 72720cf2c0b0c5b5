/**
 * Conversations with language models as replicated documents: what other programs import.
 *
 * The types are in `api.ts`; {@link openClient} is where everything begins:
 *
 * ```ts
 * const client = await openClient({ url: location.origin, token, device: 'laptop' })
 * const conversation = await client.create({ title: 'Groceries' })
 * conversation.on('change', () => render(conversation.entries()))
 * await conversation.ask('What goes into a lasagne?')
 * ```
 */

export type * from './api.js'
export { openClient } from './client.js'
export type { SocketFactory, SocketLike } from './connection.js'
export type { Environment } from './environment.js'
export { type ErrorCode, ProviderError } from './errors.js'
export { IndexedDbStore } from './indexeddb.js'
export { MemoryStore, type Store } from './store.js'
export { browserTabs, loneTab, type Tabs } from './tabs.js'
