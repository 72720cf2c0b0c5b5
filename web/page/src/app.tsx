// The page as a whole: the list, the conversation that is open, what stands beside it, and the keys
// that act everywhere.

import { computed, effect, signal } from '@preact/signals'
import type { JSX } from 'preact'
import { lazy, Suspense } from 'preact/compat'
import { useEffect } from 'preact/hooks'
import { Announcer } from './announcer'
import { ConversationView } from './conversation'
import { Icon } from './icons'
import { type LiveClient, LiveConversation } from './live'
import { current, goTo, listShown, type Panel, panel, togglePanel } from './navigation'
import { Notices, notify } from './notices'
import { isOverlayOpen, Overlays, openShortcuts } from './overlays'
import { Sidebar, startConversation } from './sidebar'
import { titleOf } from './titles'
import { TreeMap } from './tree-map'

const DeveloperView = lazy(() => import('./developer').then(module => module.DeveloperView))

const opened = signal<LiveConversation | null>(null)
const isOpening = signal(false)

/** Follows where the page is: opens that conversation and lets go of the one before. */
export function followNavigation(client: LiveClient): void {
  effect(() => {
    const wanted = current.value
    const before = opened.peek()
    if (before?.on.id === wanted) return
    before?.release()
    opened.value = null
    if (wanted === null) return
    isOpening.value = true
    client.on.open(wanted).then(
      conversation => {
        if (current.peek() !== wanted) return
        isOpening.value = false
        opened.value = new LiveConversation(conversation)
      },
      error => {
        if (current.peek() !== wanted) return
        isOpening.value = false
        notify(`Not opened: ${error instanceof Error ? error.message : String(error)}`)
      }
    )
  })
  const title = computed(() => {
    const live = opened.value
    return live === null ? 'Conversations' : titleOf(live.meta.value.title)
  })
  effect(() => {
    document.title = title.value
  })
}

const PANEL_TITLES: Record<Exclude<Panel, null>, string> = {
  map: 'Branches',
  developer: 'Developer view'
}

function SidePanel({ live }: { live: LiveConversation }): JSX.Element | null {
  const shown = panel.value
  if (shown === null) return null
  return (
    <aside class={`panel panel-${shown}`} aria-label={PANEL_TITLES[shown]}>
      <header>
        <h2>{PANEL_TITLES[shown]}</h2>
        <button
          type="button"
          class="icon-button"
          aria-label="Close the panel"
          onClick={() => {
            panel.value = null
          }}
        >
          <Icon name="close" />
        </button>
      </header>
      <div class="panel-body">
        {shown === 'map' ? (
          <TreeMap live={live} />
        ) : (
          <Suspense fallback={<p class="empty">Loading…</p>}>
            <DeveloperView live={live} />
          </Suspense>
        )}
      </div>
    </aside>
  )
}

function step(client: LiveClient, by: 1 | -1): void {
  const list = client.list.value.filter(one => !one.archived)
  const at = list.findIndex(one => one.id === current.value)
  const to = list[at < 0 ? 0 : at + by]
  if (to !== undefined) goTo(to.id)
}

interface Shortcut {
  /** What `combination` makes of the event. */
  readonly on: string
  readonly act: (client: LiveClient) => void
}

const EVERYWHERE: readonly Shortcut[] = [
  { on: 'ctrl+shift+o', act: client => void startConversation(client) },
  { on: 'ctrl+shift+m', act: () => togglePanel('map') },
  { on: 'ctrl+shift+d', act: () => togglePanel('developer') },
  { on: 'ctrl+k', act: () => focusSoon('search') },
  { on: 'alt+arrowup', act: client => step(client, -1) },
  { on: 'alt+arrowdown', act: client => step(client, 1) },
  {
    on: 'escape',
    act: () => {
      if (panel.value === null) focusSoon('composer')
      else panel.value = null
    }
  }
]
/** Where nobody types. */
const ELSEWHERE: readonly Shortcut[] = [
  { on: '?', act: openShortcuts },
  { on: 'shift+?', act: openShortcuts }
]

const combination = (event: KeyboardEvent): string =>
  [
    event.ctrlKey || event.metaKey ? 'ctrl' : '',
    event.altKey ? 'alt' : '',
    event.shiftKey ? 'shift' : '',
    event.key.toLowerCase()
  ]
    .filter(part => part !== '')
    .join('+')

function onKey(event: KeyboardEvent, client: LiveClient): void {
  if (event.defaultPrevented || isOverlayOpen()) return
  const isTyping = (event.target as Element).closest('input, textarea, select') !== null
  const pressed = combination(event)
  const known = [...EVERYWHERE, ...(isTyping ? [] : ELSEWHERE)].find(one => one.on === pressed)
  if (known === undefined) return
  event.preventDefault()
  known.act(client)
}

/** On a narrow screen the list must come to the front before anything in it can have the focus. */
function focusSoon(id: 'search' | 'composer'): void {
  listShown.value = id === 'search'
  requestAnimationFrame(() => document.getElementById(id)?.focus())
}

export function App({ client }: { client: LiveClient }): JSX.Element {
  const live = opened.value
  useEffect(() => {
    const listener = (event: KeyboardEvent): void => onKey(event, client)
    addEventListener('keydown', listener)
    return () => removeEventListener('keydown', listener)
  }, [client])
  const problem = client.storeProblem.value
  return (
    <>
      {/* Buttons, since the address says which conversation is shown. */}
      <button type="button" class="skip" onClick={() => focusSoon('composer')}>
        To the message field
      </button>
      <button type="button" class="skip" onClick={() => focusSoon('search')}>
        To the list of conversations
      </button>
      <div
        class="page"
        data-list={listShown.value}
        data-panel={panel.value !== null && live !== null}
      >
        <Sidebar client={client} />
        {live === null ? (
          <main class="conversation nothing" aria-label="No conversation">
            {isOpening.value ? null : <p class="welcome">Choose a conversation, or begin one.</p>}
          </main>
        ) : (
          <ConversationView key={live.on.id} client={client} live={live} />
        )}
        {live !== null && <SidePanel live={live} />}
      </div>
      {problem !== '' && (
        <p class="store-problem" role="alert">
          This device does not keep what you write: {problem}
        </p>
      )}
      <Overlays client={client} live={live} />
      <Notices />
      <Announcer />
    </>
  )
}
