/**
 * A conversation for reading elsewhere: all of it as JSON, what is shown as Markdown.
 *
 * This module owns the two forms. It must not know Yjs or connections.
 */

import type { Entry, Grant, Meta } from './api.js'
import { base64url } from './schema.js'

/** What stands in the place of a withdrawn entry. */
export const WITHDRAWN = '(withdrawn)'

/** What is exported. */
export interface Exported {
  readonly id: string
  readonly meta: Meta
  readonly access: ReadonlyMap<string, Grant>
  /** All entries. */
  readonly entries: readonly Entry[]
  /** The ids of what is shown, in order. */
  readonly view: readonly string[]
}

/** Everything that is readable, as indented JSON. Bytes are base64url; `view` is the shown order. */
export const toJson = ({ id, meta, access, entries, view }: Exported): string =>
  JSON.stringify(
    {
      format: 'crdt-llm conversation 1',
      id,
      meta,
      access: Object.fromEntries([...access].sort()),
      view,
      entries: Object.fromEntries(
        [...entries]
          .sort((a, b) => (a.id < b.id ? -1 : 1))
          .map(({ id: key, ...rest }) => [key, rest])
      )
    },
    (_, value: unknown) => (value instanceof Uint8Array ? base64url(value) : value),
    2
  )

/** What is shown, as one heading a turn. */
export const toMarkdown = ({ meta, entries, view }: Exported): string => {
  const byId = new Map(entries.map(entry => [entry.id, entry]))
  const parts = view.flatMap(id => {
    const entry = byId.get(id)
    if (entry === undefined) return []
    const who = entry.isSlot ? 'assistant' : entry.born.author || entry.born.role
    const role = entry.born.role === 'user' || entry.isSlot ? '' : ` (${entry.born.role})`
    const text = entry.standing === 'redacted' ? WITHDRAWN : entry.content
    const note =
      entry.standing === 'failed' || entry.standing === 'stopped' ? `\n\n*${entry.standing}*` : ''
    return [`## ${who}${role}\n\n${text}${note}\n`]
  })
  return [`# ${meta.title || 'Conversation'}\n`, ...parts].join('\n')
}
