// The messages of what is shown, and how they scroll: the end stays in sight while a reply grows, as
// long as the reader is there; what somebody reads further up never moves.
//
// Of a long conversation only a stretch is in the document: thousands of messages there would make each
// token a long task. It moves along with the reader, who sees the same messages in the same place.

import { useSignal } from '@preact/signals'
import type { JSX } from 'preact'
import { useEffect, useLayoutEffect, useRef } from 'preact/hooks'
import { announce } from './announcer'
import { copyText } from './copy'
import { Icon } from './icons'
import { type LiveConversation, mayWrite } from './live'
import { active, edit, editing, elementIdOf, lookAtSibling, Message } from './message'
import { attempt } from './notices'
import { openWithdraw } from './overlays'

const STRETCH_FIRST = 40 // messages: more than a screen, less than a frame's work
const STRETCH_STEP = 20
const STRETCH_MAX = 100
const NEAR_PX = 1000 // nearer to an end of the stretch than this, it moves on
const END_PX = 48 // nearer to the end than this is at the end
const SAID_CHARACTERS_MAX = 400

/** Which messages are in the document: those from `first` on, up to `end`; `null` follows what comes. */
interface Stretch {
  readonly first: number
  readonly end: number | null
}

const stretchAtEnd = (length: number): Stretch => ({
  first: Math.max(0, length - STRETCH_FIRST),
  end: null
})

function stretchAround(index: number, length: number): Stretch {
  const end = index + STRETCH_STEP
  return { first: Math.max(0, index - STRETCH_STEP), end: end < length ? end : null }
}

/** The stretch one step further up or down; the far end gives up as much as it has too many. */
function moved({ first, end }: Stretch, by: 'up' | 'down', length: number): Stretch {
  if (by === 'up') {
    const top = Math.max(0, first - STRETCH_STEP)
    const bottom = Math.min(end ?? length, top + STRETCH_MAX)
    return { first: top, end: bottom < length ? bottom : null }
  }
  const bottom = Math.min(length, (end ?? length) + STRETCH_STEP)
  return { first: Math.max(first, bottom - STRETCH_MAX), end: bottom < length ? bottom : null }
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

type Focus = (id: string | undefined) => void

/** Keys on a message. Letters act only here, where nobody types. */
function onKey(event: KeyboardEvent, live: LiveConversation, focusOn: Focus): void {
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
  const writes = mayWrite(live)
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
      ? { e: () => edit(id) }
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
  const stretch = useSignal<Stretch>(stretchAtEnd(live.path.peek().length))
  // The message that stays where it is while others come and go around it.
  const anchor = useRef<{ id: string; top: number } | null>(null)
  const wanted = useRef('')
  useSpokenReplies(live)
  const path = live.path.value
  const toEnd = (): void => {
    const box = scroller.current
    if (box !== null) box.scrollTop = box.scrollHeight
  }
  const goToEnd = (): void => {
    isAtEnd.value = true
    stretch.value = stretchAtEnd(live.path.peek().length)
    toEnd()
  }
  const follow = (): void => {
    const box = scroller.current
    if (box === null) return
    const { first, end } = stretch.peek()
    const length = live.path.peek().length
    const below = box.scrollHeight - box.scrollTop - box.clientHeight
    isAtEnd.value = end === null && below < END_PX
    const by =
      first > 0 && box.scrollTop < NEAR_PX ? 'up' : end !== null && below < NEAR_PX ? 'down' : null
    if (by === null) return
    const edge = box.getBoundingClientRect().top
    for (const article of list.current?.querySelectorAll<HTMLElement>('.message') ?? []) {
      const { top, bottom } = article.getBoundingClientRect()
      if (bottom > edge) {
        anchor.current = { id: article.id, top }
        break
      }
    }
    stretch.value = moved({ first, end }, by, length)
  }
  const focusOn: Focus = id => {
    if (id === undefined) return
    active.value = id
    if (document.getElementById(elementIdOf(id)) === null) {
      const index = path.indexOf(id)
      if (index < 0) return
      wanted.current = id
      stretch.value = stretchAround(index, path.length)
      return
    }
    reveal(id)
  }
  useLayoutEffect(() => {
    active.value = ''
    editing.value = ''
    goToEnd()
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
    const { first, end } = stretch.peek()
    if (entry?.standing === 'unsent') goToEnd()
    else if (isAtEnd.peek() && (end !== null || path.length - first > STRETCH_MAX)) goToEnd()
  }, [last])
  useLayoutEffect(() => {
    if (wanted.current !== '') {
      reveal(wanted.current)
      wanted.current = ''
    } else if (isAtEnd.peek()) {
      toEnd()
    } else if (anchor.current !== null && scroller.current !== null) {
      const article = document.getElementById(anchor.current.id)
      if (article !== null) {
        scroller.current.scrollTop += article.getBoundingClientRect().top - anchor.current.top
      }
    }
    anchor.current = null
    follow()
  }, [stretch.value])
  const { first, end } = stretch.value
  const shown = path.slice(first, end ?? path.length)
  // One message is a stop of the tab key, whatever is in sight.
  const stop = shown.includes(active.value) ? active.value : shown.at(-1)
  return (
    <div class="scroller" ref={scroller} onScroll={follow}>
      <ol
        class="messages"
        ref={list}
        aria-label="Messages"
        onKeyDown={event => onKey(event, live, focusOn)}
      >
        {shown.map((id, index) => (
          <li key={id} aria-posinset={first + index + 1} aria-setsize={path.length}>
            <Message
              id={id}
              live={live}
              principal={principal}
              isLast={id === last}
              isActive={id === stop}
            />
          </li>
        ))}
      </ol>
      {!isAtEnd.value && (
        <button type="button" class="to-end" aria-label="To the last message" onClick={goToEnd}>
          <Icon name="down" />
        </button>
      )}
    </div>
  )
}

function reveal(id: string): void {
  const element = document.getElementById(elementIdOf(id))
  element?.focus({ preventScroll: true })
  element?.scrollIntoView({ block: 'nearest' })
}
