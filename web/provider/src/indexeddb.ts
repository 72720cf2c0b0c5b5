/**
 * What a device keeps, in IndexedDB.
 *
 * This module owns the tables and their transactions. It must not know Yjs, sockets, or what a write
 * means. Each method is one transaction, so that several tabs may write at once: none of them ever
 * removes what it has not read in the same transaction.
 */

import { ProviderError } from './errors.js'
import {
  type Cursor,
  isKept,
  type Kept,
  NO_PROFILE,
  type Profile,
  type RefusedRow,
  type Row,
  type Step,
  type Store
} from './store.js'

const VERSION = 1
const TABLES = ['updates', 'cursors', 'outbox', 'refused'] as const
const PROFILE = 'profile'

type Table = (typeof TABLES)[number]
/** In the tables below every line names its conversation, which an index finds. */
type Line<T> = T & { readonly conversation: string }

const answer = <T>(request: IDBRequest<T>): Promise<T> =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result)
    request.onerror = () => reject(failure(request.error))
  })

const failure = (error: DOMException | null): ProviderError =>
  new ProviderError('store', `this browser's storage failed: ${error?.message ?? 'unknown reason'}`)

const done = (transaction: IDBTransaction): Promise<void> =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve()
    transaction.onabort = () => reject(failure(transaction.error))
    transaction.onerror = () => reject(failure(transaction.error))
  })

const ofConversation = <T>(table: IDBObjectStore, conversation: string): Promise<Line<T>[]> =>
  answer(table.index('conversation').getAll(conversation)) as Promise<Line<T>[]>

/** Keeps everything in one database. Make one with {@link IndexedDbStore.open}. */
export class IndexedDbStore implements Store {
  private constructor(private readonly database: IDBDatabase) {}

  /**
   * Open a database, or make it.
   *
   * @param name Of the database; one for each account and relay.
   * @param factory By default the browser's.
   * @throws ProviderError `store`.
   */
  static open(name: string, factory: IDBFactory = indexedDB): Promise<IndexedDbStore> {
    return new Promise((resolve, reject) => {
      const request = factory.open(name, VERSION)
      request.onupgradeneeded = () => {
        const database = request.result
        database.createObjectStore(PROFILE)
        database.createObjectStore('cursors')
        const updates = database.createObjectStore('updates', { autoIncrement: true })
        const outbox = database.createObjectStore('outbox', { keyPath: 'id' })
        const refused = database.createObjectStore('refused', { keyPath: 'id' })
        for (const table of [updates, outbox, refused]) {
          table.createIndex('conversation', 'conversation')
        }
      }
      request.onsuccess = () => {
        const database = request.result
        // A newer version of the page in another tab must not wait for this one.
        database.onversionchange = () => database.close()
        resolve(new IndexedDbStore(database))
      }
      request.onerror = () => reject(failure(request.error))
    })
  }

  async profile(): Promise<Profile> {
    const tables = this.begin('readonly', PROFILE)
    const kept = await answer<Profile | undefined>(tables(PROFILE).get(PROFILE))
    return kept ?? NO_PROFILE
  }

  async saveProfile(profile: Profile): Promise<void> {
    const tables = this.begin('readwrite', PROFILE)
    tables(PROFILE).put(profile, PROFILE)
    await tables.done
  }

  async load(conversation: string): Promise<Kept> {
    const tables = this.begin('readonly', ...TABLES)
    const [updates, cursor, outbox, refused] = await Promise.all([
      ofConversation<{ update: Uint8Array }>(tables('updates'), conversation),
      answer<Cursor | undefined>(tables('cursors').get(conversation)),
      ofConversation<Row>(tables('outbox'), conversation),
      ofConversation<RefusedRow>(tables('refused'), conversation)
    ])
    return {
      updates: updates.map(line => line.update),
      cursor: cursor ?? null,
      outbox: outbox.sort((a, b) => a.order - b.order),
      refused
    }
  }

  async write(conversation: string, steps: readonly Step[]): Promise<void> {
    const tables = this.begin('readwrite', ...TABLES)
    // Nothing but requests of this transaction is awaited, or it would end in between.
    let kept = (await answer<Cursor | undefined>(tables('cursors').get(conversation))) ?? null
    for (const one of steps) {
      switch (one.step) {
        case 'append':
          if (isKept(kept, one.cursor)) break
          tables('updates').add({ conversation, update: one.update })
          if (one.cursor !== null) {
            kept = one.cursor
            tables('cursors').put(kept, conversation)
          }
          break
        case 'put':
          tables('outbox').put({ ...one.row, conversation })
          break
        case 'drop':
          tables('outbox').delete(one.row)
          break
        case 'refuse':
          tables('refused').put({ ...one.refused, conversation })
          break
        case 'discard':
          tables('refused').delete(one.refused)
      }
    }
    await tables.done
  }

  async compact(
    conversation: string,
    merge: (updates: readonly Uint8Array[]) => Uint8Array
  ): Promise<void> {
    const tables = this.begin('readwrite', 'updates')
    const table = tables('updates')
    const [keys, lines] = await Promise.all([
      answer(table.index('conversation').getAllKeys(conversation)),
      ofConversation<{ update: Uint8Array }>(table, conversation)
    ])
    table.add({ conversation, update: merge(lines.map(line => line.update)) })
    for (const key of keys) table.delete(key)
    await tables.done
  }

  async adopt(conversation: string, gone: readonly string[], tab: string): Promise<readonly Row[]> {
    const tables = this.begin('readwrite', 'outbox')
    const rows = await ofConversation<Row>(tables('outbox'), conversation)
    const taken = rows.filter(row => gone.includes(row.tab)).map(row => ({ ...row, tab }))
    for (const row of taken) tables('outbox').put(row)
    await tables.done
    return taken
  }

  async waiting(): Promise<readonly string[]> {
    const tables = this.begin('readonly', 'outbox')
    const rows = (await answer(tables('outbox').getAll())) as Line<Row>[]
    return [...new Set(rows.map(row => row.conversation))]
  }

  async forget(conversation: string): Promise<void> {
    const tables = this.begin('readwrite', ...TABLES)
    tables('cursors').delete(conversation)
    for (const name of ['updates', 'outbox', 'refused'] as const) {
      const table = tables(name)
      const keys = await answer(table.index('conversation').getAllKeys(conversation))
      for (const key of keys) table.delete(key)
    }
    await tables.done
  }

  async close(): Promise<void> {
    this.database.close()
  }

  private begin(
    mode: IDBTransactionMode,
    ...names: (Table | typeof PROFILE)[]
  ): ((name: Table | typeof PROFILE) => IDBObjectStore) & { done: Promise<void> } {
    let transaction: IDBTransaction
    try {
      transaction = this.database.transaction(names, mode)
    } catch (error) {
      throw error instanceof DOMException ? failure(error) : error
    }
    const finished = done(transaction)
    finished.catch(() => undefined) // whoever reads alone hears of it from the request
    return Object.assign((name: Table | typeof PROFILE) => transaction.objectStore(name), {
      done: finished
    })
  }
}
