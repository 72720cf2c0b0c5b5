// A conversation: its head, its messages, what stands in their way, and where one writes.

import type { NodePresence, Presence, RefusedWrite } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { Composer } from './composer'
import { CopyButton } from './copy'
import { saveAs } from './files'
import { Icon } from './icons'
import { type LiveClient, type LiveConversation, mayWrite } from './live'
import { Menu, type MenuItem } from './menu'
import { Messages } from './messages'
import { goTo, panel, showList, togglePanel } from './navigation'
import { attempt } from './notices'
import { openRename, openShare } from './overlays'
import { count, plural } from './times'
import { titleOf } from './titles'

const PEOPLE_SHOWN = 4

function People({ live }: { live: LiveConversation }): JSX.Element | null {
  const people = live.presence.value.filter(one => one.node === null)
  if (people.length < 2) return null
  const name = (one: Presence): string =>
    `${one.device || 'a device'}${one.self ? ' (this one)' : ''}`
  const names = people.map(name)
  return (
    <ul
      class="people"
      aria-label={`Here now: ${names.join(', ')}`}
      title={`Here now:\n${names.join('\n')}`}
    >
      {people.slice(0, PEOPLE_SHOWN).map(one => (
        <li key={one.client} class={one.self ? 'self' : undefined}>
          <span aria-hidden="true">{(one.device || '?').slice(0, 1).toUpperCase()}</span>
          <span class="visually-hidden">{name(one)}</span>
        </li>
      ))}
      {people.length > PEOPLE_SHOWN && <li>+{people.length - PEOPLE_SHOWN}</li>}
    </ul>
  )
}

function doing(node: NodePresence): string {
  switch (node.doing) {
    case 'prefilling':
      return 'Reading'
    case 'generating':
      return 'Writing'
    case 'queued':
      return node.queue > 0 ? `Number ${count(node.queue)} in the queue` : 'In the queue'
    default:
      return 'Ready'
  }
}

function NodeState({ live }: { live: LiveConversation }): JSX.Element {
  const node = live.presence.value.find(one => one.node !== null)?.node ?? null
  if (node === null) {
    return (
      <span class="node absent" title="No model takes part in this conversation now.">
        <span class="dot" aria-hidden="true" />
        <span class="node-words">No model here</span>
      </span>
    )
  }
  const warm = node.tokens === 0 ? '' : `${count(node.warm)} / ${count(node.tokens)}`
  return (
    <span
      class={`node ${node.doing}`}
      title={`${node.model}\n${doing(node)}${warm && `\n${warm} tokens of this conversation are warm: the model need not read them again.`}`}
    >
      <span class="dot" aria-hidden="true" />
      <span class="node-words">{doing(node)}</span>
      {warm !== '' && (
        <span class="node-warm">
          {warm}
          <span class="visually-hidden"> tokens warm</span>
        </span>
      )}
    </span>
  )
}

function syncWords(client: LiveClient, live: LiveConversation): string {
  const { state, unsent } = live.status.value
  const waiting = unsent === 0 ? '' : `${plural(unsent, 'change')} not stored at the relay yet`
  if (state === 'offline') return waiting ? `Offline. ${waiting}.` : 'Offline'
  if (state === 'syncing') return 'Syncing…'
  return client.status.value.state === 'online' ? (waiting ? 'Saving…' : '') : 'Connecting…'
}

function Head({ client, live }: { client: LiveClient; live: LiveConversation }): JSX.Element {
  const { title, owner } = live.meta.value
  const { grant } = live.status.value
  const id = live.on.id
  const isArchived = client.list.value.find(one => one.id === id)?.archived === true
  const isBirth = owner !== null && owner === client.status.value.principal
  const isReader = !mayWrite(live)
  const items: MenuItem[] = [
    ...(isReader ? [] : [{ label: 'Rename', icon: 'edit' as const, act: () => openRename(id) }]),
    { label: 'Share', icon: 'share', act: openShare },
    {
      label: 'Map of the branches',
      icon: 'branch',
      checked: panel.value === 'map',
      act: () => togglePanel('map')
    },
    {
      label: 'Developer view',
      icon: 'code',
      checked: panel.value === 'developer',
      act: () => togglePanel('developer')
    },
    {
      label: 'Save as Markdown',
      icon: 'down',
      act: () => saveAs(live.on.export('markdown'), title, 'md')
    },
    {
      label: 'Save as JSON',
      icon: 'down',
      act: () => saveAs(live.on.export('json'), title, 'json')
    },
    {
      label: isArchived ? 'Bring back' : 'Archive',
      icon: 'archive',
      act: () => void attempt('Not archived', () => client.on.archive(id, !isArchived))
    },
    ...(isBirth || grant === null
      ? []
      : [
          {
            label: 'Leave',
            icon: 'exit' as const,
            danger: true,
            act: () =>
              void attempt('Not left', () => live.on.leave()).then(done => {
                if (done) goTo(null)
              })
          }
        ])
  ]
  return (
    <header class="head">
      <button
        type="button"
        class="icon-button to-list"
        aria-label="Conversations"
        onClick={showList}
      >
        <Icon name="back" />
      </button>
      <div class="head-title">
        <h2>{titleOf(title)}</h2>
        <span class="sync" role="status">
          {syncWords(client, live)}
        </span>
      </div>
      <People live={live} />
      <NodeState live={live} />
      <Menu label="Conversation" items={items} />
    </header>
  )
}

const KINDS: Record<RefusedWrite['kind'], string> = {
  create: 'The conversation',
  entry: 'Your message',
  request: 'Your request for a reply',
  stop: 'Your stop',
  redact: 'Your withdrawal',
  meta: 'Your change',
  access: 'Your change of rights'
}

/** What the relay did not take: the text stays here until the person has done something with it. */
function RefusedWrites({ live }: { live: LiveConversation }): JSX.Element | null {
  const refused = live.refused.value
  if (refused.length === 0) return null
  return (
    <section class="refused" aria-label="Not taken">
      {refused.map(one => (
        <div class="refused-write" key={one.id}>
          <p>
            <Icon name="warning" />
            <strong>{KINDS[one.kind]} was not taken:</strong> {one.reason || one.code}
          </p>
          {one.text !== '' && <blockquote>{one.text}</blockquote>}
          <div class="buttons">
            {one.text !== '' && <CopyButton text={() => one.text} label="Copy the text" />}
            <button
              type="button"
              onClick={() => void attempt('Not dropped', () => live.on.discard(one.id))}
            >
              Drop
            </button>
            <button
              type="button"
              onClick={() => void attempt('Not sent', () => live.on.resend(one.id))}
            >
              Send again
            </button>
          </div>
        </div>
      ))}
    </section>
  )
}

function Banner({ live }: { live: LiveConversation }): JSX.Element | null {
  const { state, behind, reason, grant } = live.status.value
  const words =
    state === 'refused'
      ? `The relay does not let this conversation in: ${reason || 'no reason given'}. What is on this device can still be read.`
      : behind
        ? 'The relay lost a part of this conversation and waits for a device that has it. Until then what you write stays unanswered.'
        : grant === 'reader'
          ? 'You can read this conversation, not write in it.'
          : ''
  return words === '' ? null : (
    <p class="banner" role="status">
      {words}
    </p>
  )
}

export function ConversationView({
  client,
  live
}: {
  client: LiveClient
  live: LiveConversation
}): JSX.Element {
  const { state } = live.status.value
  const isEmpty = live.path.value.length === 0
  return (
    <main class="conversation" id="conversation" aria-label={titleOf(live.meta.value.title)}>
      <Head client={client} live={live} />
      <Messages live={live} principal={client.status.value.principal} />
      {isEmpty && (
        <p class="welcome">
          {live.on.isEmpty && state !== 'synced'
            ? 'Fetching this conversation…'
            : 'Say something to begin.'}
        </p>
      )}
      <div class="foot">
        <RefusedWrites live={live} />
        <Banner live={live} />
        {mayWrite(live) && <Composer client={client} live={live} />}
      </div>
    </main>
  )
}
