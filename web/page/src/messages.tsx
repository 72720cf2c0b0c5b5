// The messages of what is shown, and how they scroll: the end stays in sight while a reply grows, as
// long as the reader is there; what somebody reads further up never moves.
//
// Of a long conversation the end is drawn first, and the rest in pieces while nothing else happens.
// What is out of sight costs no layout (`content-visibility`), so all of it can be searched.

import { useSignal } from '@preact/signals'
import type { JSX } from 'preact'
import { useEffect, useLayoutEffect, useRef } from 'preact/hooks'
import { announce } from './announcer'
import { copyText } from './copy'
import { Icon } from './icons'
import type { LiveConversation } from './live'
import { active, editing, elementIdOf, lookAtSibling, Message } from './message'
import { attempt } from './notices'
import { openWithdraw } from './overlays'

const FIRST_DRAWN = 24 // more than a screen
const DRAWN_AT_ONCE = 12 // a piece takes a few milliseconds
const END_PX = 48 // nearer to the end than this is at the end
const SAID_CHARACTERS_MAX = 400

/** Draws the entries before those that are drawn, piece by piece, when there is nothing to do. */
function useDrawnFrom(live: LiveConversation): number {
  const length = live.path.value.length
  const drawnFrom = useSignal(Math.max(0, length - FIRST_DRAWN))
  useEffect(() => {
    let handle = 0
    const idle = window.requestIdleCallback ?? ((act: () => void) => window.setTimeout(act, 50))
    const cancel = window.cancelIdleCallback ?? window.clearTimeout
    const more = (): void => {
      if (drawnFrom.value === 0) return
      drawnFrom.value = Math.max(0, drawnFrom.value - DRAWN_AT_ONCE)
      handle = idle(more)
    }
    handle = idle(more)
    return () => cancel(handle)
  }, [live])
  return Math.min(drawnFrom.value, length)
}

/** Says a reply once it has come to its end. */
function useSpokenReplies(live: LiveConversation): void {
  const last = live.path.value.at(-1)
  const entry = last === undefined ? undefined : live.entry(last).value
  const watched = useRef('')
  useEffect(() => {
    if (entry === undefined || !entry.isSlot) return
    if (entry.standing === 'streaming') {
      watched.current = entry.id
    } else if (watched.current === entry.id) {
      watched.current = ''
      announce(
        entry.standing === 'failed'
          ? 'The reply failed.'
          : `Reply: ${entry.content.slice(0, SAID_CHARACTERS_MAX)}`
      )
    }
  }, [entry?.id, entry?.standing])
}

function focusOn(id: string | undefined): void {
  if (id === undefined) return
  active.value = id
  const element = document.getElementById(elementIdOf(id))
  element?.focus({ preventScroll: true })
  element?.scrollIntoView({ block: 'nearest' })
}

/** Keys on a message. Letters act only here, where nobody types. */
function onKey(event: KeyboardEvent, live: LiveConversation): void {
  if (event.ctrlKey || event.metaKey || event.altKey) return
  const article = (event.target as Element).closest<HTMLElement>('.message')
  const id = article?.dataset.entry
  if (id === undefined || event.target !== article) {
    if (event.key === 'Escape' && id !== undefined && editing.value === '') focusOn(id)
    return
  }
  const path = live.path.value
  const at = path.indexOf(id)
  const entry = live.on.entry(id)
  const writes = live.status.value.grant !== 'reader'
  const acts: Record<string, () => void> = {
    ArrowUp: () => focusOn(path[at - 1]),
    ArrowDown: () =>
      at === path.length - 1 ? document.getElementById('composer')?.focus() : focusOn(path[at + 1]),
    Home: () => focusOn(path[0]),
    End: () => focusOn(path.at(-1)),
    ArrowLeft: () => lookAtSibling(live, id, -1),
    ArrowRight: () => lookAtSibling(live, id, 1),
    Escape: () => document.getElementById('composer')?.focus(),
    c: () =>
      void copyText(entry?.content ?? '').then(done => announce(done ? 'Copied' : 'Not copied')),
    ...(writes && entry?.born.role === 'user' && entry.standing !== 'redacted'
      ? { e: () => void (editing.value = id) }
      : {}),
    ...(writes && entry?.isSlot
      ? { r: () => void attempt('Not asked again', () => live.on.regenerate(id)) }
      : {}),
    ...(writes && entry?.standing !== 'redacted' ? { Delete: () => openWithdraw(id) } : {})
  }
  const act = acts[event.key]
  if (act === undefined) return
  event.preventDefault()
  event.stopPropagation()
  act()
}

export function Messages({
  live,
  principal
}: {
  live: LiveConversation
  principal: string | null
}): JSX.Element {
  const scroller = useRef<HTMLDivElement>(null)
  const list = useRef<HTMLOListElement>(null)
  const isAtEnd = useSignal(true)
  const drawnFrom = useDrawnFrom(live)
  useSpokenReplies(live)
  const path = live.path.value
  const toEnd = (): void => {
    const box = scroller.current
    if (box !== null) box.scrollTop = box.scrollHeight
  }
  useLayoutEffect(() => {
    active.value = ''
    editing.value = ''
    isAtEnd.value = true
    toEnd()
  }, [live])
  useEffect(() => {
    const box = scroller.current
    const content = list.current
    if (box === null || content === null) return undefined
    const sizes = new ResizeObserver(() => {
      if (isAtEnd.peek()) toEnd()
    })
    sizes.observe(content)
    sizes.observe(box)
    return () => sizes.disconnect()
  }, [live])
  // What somebody writes here is wanted in sight, wherever they had scrolled to.
  const last = path.at(-1)
  useLayoutEffect(() => {
    const entry = last === undefined ? undefined : live.on.entry(last)
    if (entry?.standing === 'unsent') {
      isAtEnd.value = true
      toEnd()
    }
  }, [last])
  return (
    <div
      class="scroller"
      ref={scroller}
      onScroll={event => {
        const box = event.currentTarget
        isAtEnd.value = box.scrollHeight - box.scrollTop - box.clientHeight < END_PX
      }}
    >
      <ol class="messages" ref={list} aria-label="Messages" onKeyDown={event => onKey(event, live)}>
        {path.slice(drawnFrom).map(id => (
          <Message key={id} id={id} live={live} principal={principal} isLast={id === last} />
        ))}
      </ol>
      {!isAtEnd.value && (
        <button
          type="button"
          class="to-end"
          aria-label="To the last message"
          onClick={() => {
            isAtEnd.value = true
            toEnd()
          }}
        >
          <Icon name="down" />
        </button>
      )}
    </div>
  )
}
