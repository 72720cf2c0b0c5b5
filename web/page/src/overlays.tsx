// What lies over the page: which dialog is open, one at a time.

import { signal } from '@preact/signals'
import type { JSX } from 'preact'
import { useState } from 'preact/hooks'
import { Dialog } from './dialog'
import type { LiveClient, LiveConversation } from './live'
import { current } from './navigation'
import { attempt } from './notices'
import { SettingsForm } from './preferences'
import { ShareForm } from './share'
import { SHORTCUTS } from './shortcuts'
import { titleFrom } from './titles'

type Overlay =
  | { readonly kind: 'shortcuts' | 'settings' | 'share' }
  | { readonly kind: 'rename'; readonly conversation: string }
  | { readonly kind: 'withdraw'; readonly entry: string }

const overlay = signal<Overlay | null>(null)

export const isOverlayOpen = (): boolean => overlay.value !== null

function show(wanted: Overlay): void {
  overlay.value = wanted
}
export const openShortcuts = (): void => show({ kind: 'shortcuts' })
export const openSettings = (): void => show({ kind: 'settings' })
export const openShare = (): void => show({ kind: 'share' })
export const openRename = (conversation: string): void => show({ kind: 'rename', conversation })
export const openWithdraw = (entry: string): void => show({ kind: 'withdraw', entry })

const close = (): void => {
  overlay.value = null
}

const TITLE_CHARACTERS_MAX = 500

/** Renames a conversation of the list, which this device may not have yet. */
async function rename(client: LiveClient, id: string, title: string): Promise<void> {
  const conversation = await client.on.open(id)
  // A title beside one that is not known here could lose against it.
  if (conversation.isEmpty) await conversation.synced()
  await conversation.rename(title)
}

function RenameForm({
  client,
  conversation
}: {
  client: LiveClient
  conversation: string
}): JSX.Element {
  const known = client.list.value.find(one => one.id === conversation)?.title ?? ''
  const [title, setTitle] = useState(known)
  return (
    <form
      onSubmit={event => {
        event.preventDefault()
        close()
        void attempt('Not renamed', () => rename(client, conversation, title.trim()))
      }}
    >
      <label>
        Title
        <input
          value={title}
          maxLength={TITLE_CHARACTERS_MAX}
          onInput={event => setTitle(event.currentTarget.value)}
          autofocus
        />
      </label>
      <div class="buttons">
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button type="submit" class="primary">
          Rename
        </button>
      </div>
    </form>
  )
}

/** Withdraws an entry, and the title that was made of it. */
async function withdraw(live: LiveConversation, id: string): Promise<void> {
  const text = live.on.entry(id)?.content ?? ''
  const { title } = live.on.meta
  await live.on.redact(id)
  if (title !== '' && title === titleFrom(text)) await live.on.rename('')
}

function WithdrawForm({ live, entry }: { live: LiveConversation; entry: string }): JSX.Element {
  return (
    <>
      <p>
        The text goes from every device and from the relay, for good. That there was an entry stays
        visible, and what the model answered to it stays too.
      </p>
      <div class="buttons">
        <button type="button" onClick={close}>
          Cancel
        </button>
        <button
          type="button"
          class="danger"
          onClick={() => {
            close()
            void attempt('Not withdrawn', () => withdraw(live, entry))
          }}
        >
          Withdraw
        </button>
      </div>
    </>
  )
}

function Shortcuts(): JSX.Element {
  return (
    <table class="shortcuts">
      <thead class="visually-hidden">
        <tr>
          <th scope="col">Keys</th>
          <th scope="col">What they do</th>
        </tr>
      </thead>
      <tbody>
        {SHORTCUTS.map(({ keys, does }) => (
          <tr key={does}>
            <td>
              {keys.map(key => (
                <kbd key={key}>{key}</kbd>
              ))}
            </td>
            <td>{does}</td>
          </tr>
        ))}
      </tbody>
    </table>
  )
}

export function Overlays({
  client,
  live
}: {
  client: LiveClient
  live: LiveConversation | null
}): JSX.Element | null {
  const open = overlay.value
  if (open === null) return null
  switch (open.kind) {
    case 'shortcuts':
      return (
        <Dialog title="Keyboard shortcuts" onClose={close}>
          <Shortcuts />
        </Dialog>
      )
    case 'settings':
      return (
        <Dialog title="Settings" onClose={close}>
          <SettingsForm client={client} />
        </Dialog>
      )
    case 'rename':
      return (
        <Dialog title="Rename conversation" onClose={close}>
          <RenameForm client={client} conversation={open.conversation} />
        </Dialog>
      )
    case 'share':
      return live === null || live.on.id !== current.value ? null : (
        <Dialog title="Share" onClose={close}>
          <ShareForm client={client} live={live} />
        </Dialog>
      )
    case 'withdraw':
      return live === null ? null : (
        <Dialog title="Withdraw this message?" onClose={close}>
          <WithdrawForm live={live} entry={open.entry} />
        </Dialog>
      )
  }
}
