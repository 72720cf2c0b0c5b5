// The list of conversations: live, searched as one types, walked with the arrows.

import { computed, signal } from '@preact/signals'
import type { Listed } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { useRef } from 'preact/hooks'
import { ConnectionLine } from './connection'
import { Icon } from './icons'
import type { LiveClient } from './live'
import { Menu } from './menu'
import { addressOf, current, goTo } from './navigation'
import { attempt } from './notices'
import { openRename, openSettings, openShortcuts } from './overlays'
import { machineTime, shortTime } from './times'
import { titleOf } from './titles'

const LISTED_MAX = 300 // rows in the document; a search finds the others

const search = signal('')
const showsArchived = signal(false)

function Row({
  summary,
  client,
  first
}: {
  summary: Listed
  client: LiveClient
  first: boolean
}): JSX.Element {
  const isCurrent = current.value === summary.id
  return (
    <li class={isCurrent ? 'row current' : 'row'}>
      <a
        href={addressOf(summary.id)}
        aria-current={isCurrent ? 'page' : undefined}
        tabIndex={isCurrent || first ? 0 : -1}
        onClick={event => {
          if (event.ctrlKey || event.metaKey || event.shiftKey) return
          event.preventDefault()
          goTo(summary.id)
        }}
      >
        <span class="row-title">{titleOf(summary.title)}</span>
        <span class="row-facts">
          {summary.role === 'reader' && <span>can read · </span>}
          {summary.role === 'writer' && <span>shared · </span>}
          <time dateTime={machineTime(summary.changedAt)}>{shortTime(summary.changedAt)}</time>
        </span>
      </a>
      <Menu
        label={`Actions for ${titleOf(summary.title)}`}
        items={[
          ...(summary.role === 'reader'
            ? []
            : [{ label: 'Rename', icon: 'edit' as const, act: () => openRename(summary.id) }]),
          {
            label: summary.archived ? 'Bring back' : 'Archive',
            icon: 'archive',
            act: () =>
              void attempt('Not archived', () => client.on.archive(summary.id, !summary.archived))
          }
        ]}
      />
    </li>
  )
}

export function Sidebar({ client }: { client: LiveClient }): JSX.Element {
  const list = useRef<HTMLUListElement>(null)
  const shown = useRef(
    computed(() => {
      const wanted = search.value.trim().toLocaleLowerCase()
      return client.list.value.filter(
        one =>
          one.archived === showsArchived.value &&
          (wanted === '' || titleOf(one.title).toLocaleLowerCase().includes(wanted))
      )
    })
  ).current
  const links = (): HTMLAnchorElement[] => [...(list.current?.querySelectorAll('a') ?? [])]
  const walk = (event: KeyboardEvent): void => {
    const all = links()
    const at = all.indexOf(document.activeElement as HTMLAnchorElement)
    if (at < 0) return
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key]
    if (to === undefined) return
    event.preventDefault()
    all[Math.min(Math.max(to, 0), all.length - 1)]?.focus()
  }
  const rows = shown.value.slice(0, LISTED_MAX)
  const currentShown = rows.some(one => one.id === current.value)
  return (
    <nav class="sidebar" aria-label="Conversations">
      <header>
        <h1>Conversations</h1>
        <button
          type="button"
          class="icon-button"
          aria-label="New conversation"
          title="New conversation (Ctrl+Shift+O)"
          onClick={() => void startConversation(client)}
        >
          <Icon name="plus" />
        </button>
      </header>
      <div class="search">
        <Icon name="search" />
        <input
          id="search"
          type="search"
          aria-label="Search conversations"
          placeholder="Search"
          autocomplete="off"
          value={search.value}
          onInput={event => {
            search.value = event.currentTarget.value
          }}
          onKeyDown={event => {
            if (event.key === 'ArrowDown' || event.key === 'Enter') {
              event.preventDefault()
              const target = links()[0]
              if (event.key === 'Enter') target?.click()
              else target?.focus()
            }
          }}
        />
      </div>
      {rows.length === 0 ? (
        <p class="empty">
          {search.value
            ? 'None has that in its title.'
            : showsArchived.value
              ? 'Nothing is archived.'
              : 'None yet. Begin one with the plus above.'}
        </p>
      ) : (
        <ul class="rows" ref={list} onKeyDown={walk}>
          {rows.map((one, index) => (
            <Row key={one.id} summary={one} client={client} first={!currentShown && index === 0} />
          ))}
          {shown.value.length > rows.length && (
            <li class="empty">{shown.value.length - rows.length} more: search for them.</li>
          )}
        </ul>
      )}
      <footer>
        <ConnectionLine client={client} />
        <div class="footer-buttons">
          <button
            type="button"
            class="icon-button"
            aria-label="Show archived"
            aria-pressed={showsArchived.value}
            title="Archived conversations"
            onClick={() => {
              showsArchived.value = !showsArchived.value
            }}
          >
            <Icon name="archive" />
          </button>
          <button
            type="button"
            class="icon-button"
            aria-label="Keyboard shortcuts"
            title="Keyboard shortcuts (?)"
            onClick={openShortcuts}
          >
            <Icon name="keyboard" />
          </button>
          <button
            type="button"
            class="icon-button"
            aria-label="Settings"
            title="Settings"
            onClick={openSettings}
          >
            <Icon name="settings" />
          </button>
        </div>
      </footer>
    </nav>
  )
}

export async function startConversation(client: LiveClient): Promise<void> {
  await attempt('No conversation was made', async () => {
    showsArchived.value = false
    goTo((await client.on.create()).id)
    requestAnimationFrame(() => document.getElementById('composer')?.focus())
  })
}
