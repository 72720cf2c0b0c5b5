// One entry, as people see it. It is drawn again only when that entry changes, or when it becomes the
// one that the keyboard stands on.

import { signal } from '@preact/signals'
import type { Entry } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { memo } from 'preact/compat'
import { useRef, useState } from 'preact/hooks'
import { CopyButton } from './copy'
import { Formatted, Plain } from './formatted'
import { Icon } from './icons'
import { type LiveConversation, mayWrite } from './live'
import { attempt } from './notices'
import { openWithdraw } from './overlays'
import { clockTime, fullTime, machineTime } from './times'

/** The entry that the keyboard stands on; `''` is the last. */
export const active = signal('')
/** The entry that is being edited. */
export const editing = signal('')

export function edit(entry: string): void {
  editing.value = entry
}

export const elementIdOf = (entry: string): string => `entry-${entry}`

const ROLE_NAMES = { system: 'System', user: 'You', assistant: 'Reply', tool: 'Tool' } as const

function speaker(entry: Entry, principal: string | null): string {
  const { role, author, device } = entry.born
  if (role === 'assistant') return 'Reply'
  if (role !== 'user') return `${ROLE_NAMES[role]} (${author})`
  const name = author === principal ? 'You' : author
  return device ? `${name}, ${device}` : name
}

/** What is still open about an entry; `''` where there is nothing to say. */
function standingWords(entry: Entry): string {
  switch (entry.standing) {
    case 'unsent':
      return entry.isSlot ? 'Waiting to be sent' : 'Not stored at the relay yet'
    case 'pending':
      return entry.isSlot ? (entry.stop === null ? 'Waiting for the model' : 'Stopped') : ''
    case 'streaming':
      return entry.stop === null ? '' : 'Stopping…'
    case 'stopped':
      return 'Stopped'
    case 'superseded':
      return 'A later message was answered instead'
    default:
      return ''
  }
}

function Siblings({ live, entry }: { live: LiveConversation; entry: string }): JSX.Element | null {
  live.structure.value // the versions may be others now
  const ids = live.on.siblings(entry)
  if (ids.length < 2) return null
  const index = ids.indexOf(entry)
  const look = (to: number): void => lookAtSibling(live, entry, to)
  return (
    // biome-ignore lint/a11y/useSemanticElements: a fieldset is for forms
    <span class="siblings" role="group" aria-label={`Version ${index + 1} of ${ids.length}`}>
      <button
        type="button"
        class="icon-button"
        aria-label="Previous version"
        disabled={index === 0}
        onClick={() => look(-1)}
      >
        <Icon name="chevronLeft" />
      </button>
      <span aria-hidden="true">
        {index + 1} / {ids.length}
      </span>
      <button
        type="button"
        class="icon-button"
        aria-label="Next version"
        disabled={index === ids.length - 1}
        onClick={() => look(1)}
      >
        <Icon name="chevronRight" />
      </button>
    </span>
  )
}

/** Shows the version before or after an entry, and keeps the keyboard on it. */
export function lookAtSibling(live: LiveConversation, entry: string, step: 1 | -1 | number): void {
  const ids = live.on.siblings(entry)
  const wanted = ids[ids.indexOf(entry) + step]
  if (wanted === undefined) return
  const held = document.activeElement?.closest('.message')?.id === elementIdOf(entry)
  live.look(wanted)
  active.value = wanted
  if (!held) return
  // Drawn with the next frame, so found in the one after.
  requestAnimationFrame(() =>
    requestAnimationFrame(() =>
      document.getElementById(elementIdOf(wanted))?.focus({ preventScroll: true })
    )
  )
}

function EditForm({ live, entry }: { live: LiveConversation; entry: Entry }): JSX.Element {
  const [text, setText] = useState(entry.content)
  const close = (): void => {
    editing.value = ''
    document.getElementById(elementIdOf(entry.id))?.focus()
  }
  const send = async (): Promise<void> => {
    if (text.trim() === '' || text === entry.content) return close()
    if (await attempt('Not sent', () => live.on.edit(entry.id, text))) editing.value = ''
  }
  return (
    <form
      class="edit"
      onSubmit={event => {
        event.preventDefault()
        void send()
      }}
      onKeyDown={event => {
        event.stopPropagation()
        if (event.key === 'Escape') close()
        if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
          event.preventDefault()
          void send()
        }
      }}
    >
      <textarea
        aria-label="Edit the message"
        value={text}
        onInput={event => setText(event.currentTarget.value)}
        ref={field => field?.focus()}
      />
      <div class="buttons">
        <small>It becomes a branch beside the first version, which stays.</small>
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button type="submit" class="primary">
          Send
        </button>
      </div>
    </form>
  )
}

function Actions({
  live,
  entry,
  reachable
}: {
  live: LiveConversation
  entry: Entry
  reachable: boolean
}): JSX.Element {
  const tab = reachable ? 0 : -1
  const writes = mayWrite(live)
  const { id, isSlot, standing } = entry
  const isOpen =
    standing === 'streaming' || ((standing === 'pending' || standing === 'unsent') && isSlot)
  return (
    <span class="actions" data-reachable={reachable}>
      {entry.content !== '' && (
        <CopyButton text={() => entry.content} label="Copy message" tabIndex={tab} />
      )}
      {writes && isSlot && isOpen && entry.stop === null && (
        <button
          type="button"
          class="icon-button"
          aria-label="Stop"
          title="Stop"
          tabIndex={tab}
          onClick={() => void attempt('Not stopped', () => live.on.stop(id))}
        >
          <Icon name="stop" />
        </button>
      )}
      {writes && isSlot && !isOpen && (
        <button
          type="button"
          class="icon-button"
          aria-label="Ask again"
          title="Ask again"
          tabIndex={tab}
          onClick={() => void attempt('Not asked again', () => live.on.regenerate(id))}
        >
          <Icon name="redo" />
        </button>
      )}
      {writes && entry.born.role === 'user' && standing !== 'redacted' && (
        <button
          type="button"
          class="icon-button"
          aria-label="Edit as a new branch"
          title="Edit as a new branch"
          tabIndex={tab}
          onClick={() => edit(id)}
        >
          <Icon name="edit" />
        </button>
      )}
      {writes && standing !== 'redacted' && !isOpen && (
        <button
          type="button"
          class="icon-button"
          aria-label="Withdraw"
          title="Withdraw"
          tabIndex={tab}
          onClick={() => openWithdraw(id)}
        >
          <Icon name="erase" />
        </button>
      )}
    </span>
  )
}

function Body({ live, entry }: { live: LiveConversation; entry: Entry }): JSX.Element {
  if (entry.standing === 'redacted') {
    return (
      <p class="marker">
        This message was withdrawn{entry.redacted ? ` by ${entry.redacted.by}` : ''}.
      </p>
    )
  }
  if (editing.value === entry.id) return <EditForm live={live} entry={entry} />
  if (!entry.isSlot)
    return entry.born.role === 'tool' ? (
      <Plain text={entry.content} />
    ) : (
      <Formatted text={entry.content} growing={false} breaks />
    )
  const growing = entry.standing === 'streaming'
  const error = entry.usage?.error
  return (
    <>
      {entry.content === '' ? (
        growing || entry.standing === 'pending' || entry.standing === 'unsent' ? (
          entry.stop === null && (
            <span class="thinking" role="img" aria-label="The reply has not begun" />
          )
        ) : null
      ) : (
        <Formatted text={entry.content} growing={growing} />
      )}
      {entry.standing === 'failed' && (
        <p class="failure">
          <Icon name="warning" /> {error?.message || 'The model could not answer.'}
          {error?.code && <code>{error.code}</code>}
        </p>
      )}
    </>
  )
}

function MessageView({
  id,
  live,
  principal,
  isLast,
  isActive
}: {
  id: string
  live: LiveConversation
  principal: string | null
  isLast: boolean
  isActive: boolean
}): JSX.Element | null {
  const element = useRef<HTMLElement>(null)
  const entry = live.entry(id).value
  if (entry === undefined) return null
  const words = standingWords(entry)
  const who = speaker(entry, principal)
  const isOwn = entry.born.role === 'user' && entry.born.author === principal
  const cut = entry.isSlot && (entry.standing === 'stopped' || entry.usage?.finish === 'length')
  return (
    <article
      ref={element}
      id={elementIdOf(id)}
      class={`message ${entry.born.role}${isOwn ? ' own' : ''}${editing.value === id ? ' edited' : ''} ${entry.standing}`}
      data-entry={id}
      aria-label={`${who}, ${clockTime(entry.born.at)}`}
      aria-busy={entry.standing === 'streaming'}
      tabIndex={isActive ? 0 : -1}
      onFocusIn={() => {
        active.value = id
      }}
    >
      {(!isOwn || entry.born.role !== 'user') && (
        <header class="speaker">{entry.isSlot ? null : who}</header>
      )}
      <div class="body">
        <Body live={live} entry={entry} />
      </div>
      <footer>
        {words !== '' && <span class="standing">{words}</span>}
        <Siblings live={live} entry={id} />
        <Actions live={live} entry={entry} reachable={isActive} />
        {cut && isLast && mayWrite(live) && (
          <button
            type="button"
            class="link"
            tabIndex={isActive ? 0 : -1}
            onClick={() => void attempt('Not sent', () => live.on.continue(id))}
          >
            Go on
          </button>
        )}
        <time
          dateTime={machineTime(entry.born.at)}
          title={`${fullTime(entry.born.at)}, ${entry.born.device}`}
        >
          {clockTime(entry.born.at)}
        </time>
      </footer>
    </article>
  )
}

export const Message = memo(MessageView)
