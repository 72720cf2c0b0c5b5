// Where messages are written. What stands here belongs to the person: it survives reloads, is never
// part of the document until it is sent, and reaches the model early only if they let it.

import type { JSX } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import { Icon } from './icons'
import { type LiveClient, type LiveConversation, mayWrite } from './live'
import { active } from './message'
import { attempt } from './notices'
import { hints, unsent } from './settings'
import { titleFrom } from './titles'

const KEPT_AFTER_MS = 250 // typing goes to the disk in pauses

function placeholder(client: LiveClient, live: LiveConversation): string {
  return client.status.value.state === 'online' || live.status.value.state === 'synced'
    ? 'Message'
    : 'Message: it is sent when you are back online'
}

/** With a keyboard on the screen there is no Shift to make a line with: Enter does, and the button sends. */
const entersLines = (): boolean => matchMedia('(pointer: coarse)').matches

export function Composer({
  client,
  live
}: {
  client: LiveClient
  live: LiveConversation
}): JSX.Element {
  const field = useRef<HTMLTextAreaElement>(null)
  const [text, setText] = useState('')
  const keeping = useRef(0)
  const id = live.on.id
  useEffect(() => {
    setText(unsent.read(id))
    const keep = (): void => {
      clearTimeout(keeping.current)
      unsent.write(id, field.current?.value ?? '')
    }
    // A page that is closed or reloaded is told so by nothing else.
    addEventListener('pagehide', keep)
    return () => {
      removeEventListener('pagehide', keep)
      keep()
      live.on.typing('')
    }
  }, [live])
  useEffect(() => {
    live.on.hints = hints.value === 'on'
  }, [live, hints.value])
  const change = (changed: string): void => {
    setText(changed)
    live.on.typing(changed)
    clearTimeout(keeping.current)
    keeping.current = window.setTimeout(() => unsent.write(id, changed), KEPT_AFTER_MS)
  }
  const last = live.path.value.at(-1)
  const reply = last === undefined ? undefined : live.entry(last).value
  const isReplying =
    reply?.isSlot === true &&
    reply.stop === null &&
    (reply.standing === 'streaming' || reply.standing === 'pending' || reply.standing === 'unsent')
  const stop = (): void => {
    if (isReplying) void attempt('Not stopped', () => live.on.stop(reply.id))
  }
  const send = async (): Promise<void> => {
    const said = text.trim()
    if (said === '') return
    // One that is still on its way has no title here, and may well have one elsewhere.
    const { title, owner } = live.meta.value
    const untitled = owner !== null && title === '' && live.path.value.length === 0
    change('')
    const done = await attempt('Not sent', () => live.on.ask(said))
    if (!done) {
      change(said)
    } else if (untitled && mayWrite(live)) {
      await attempt('Not named', () => live.on.rename(titleFrom(said)))
    }
  }
  return (
    <form
      class="composer"
      onSubmit={event => {
        event.preventDefault()
        void send()
      }}
    >
      <textarea
        id="composer"
        ref={field}
        rows={1}
        aria-label="Message"
        placeholder={placeholder(client, live)}
        value={text}
        onInput={event => change(event.currentTarget.value)}
        onKeyDown={event => {
          if (event.key === 'Enter' && !event.shiftKey && !event.isComposing && !entersLines()) {
            event.preventDefault()
            void send()
          } else if (event.key === 'Escape' && isReplying) {
            event.stopPropagation()
            stop()
          } else if (event.key === 'ArrowUp' && text === '' && last !== undefined) {
            event.preventDefault()
            active.value = last
            document.getElementById(`entry-${last}`)?.focus()
          }
        }}
      />
      {isReplying && (
        <button
          type="button"
          class="round"
          aria-label="Stop the reply"
          title="Stop the reply (Esc)"
          onClick={stop}
        >
          <Icon name="stop" />
        </button>
      )}
      {(!isReplying || text.trim() !== '') && (
        <button
          type="submit"
          class="round primary"
          aria-label="Send"
          title="Send (Enter)"
          disabled={text.trim() === ''}
        >
          <Icon name="send" />
        </button>
      )}
    </form>
  )
}
