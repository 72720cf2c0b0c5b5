// Who may read and write a conversation, and links for somebody new.

import type { Grant, Invitation } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { useState } from 'preact/hooks'
import { CopyButton } from './copy'
import type { LiveClient, LiveConversation } from './live'
import { attempt } from './notices'

const ROLES: readonly [Grant, string][] = [
  ['owner', 'Owner'],
  ['writer', 'Can write'],
  ['reader', 'Can read']
]
const DAY_MS = 24 * 60 * 60 * 1000
const LASTING: readonly [number, string][] = [
  [DAY_MS, 'for a day'],
  [7 * DAY_MS, 'for a week'],
  [0, 'until withdrawn']
]

/** The token travels in the fragment: no request line, no log, no referrer holds it. */
export const linkFor = ({ conversation, token }: Invitation): string =>
  `${location.origin}/#${new URLSearchParams({ c: conversation, token }).toString()}`

function Access({ live }: { live: LiveConversation }): JSX.Element {
  const isOwner = live.status.value.grant === 'owner'
  const birth = live.meta.value.owner
  return (
    <ul class="people-list">
      {[...live.access.value].map(([principal, grant]) => (
        <li key={principal}>
          <span>{principal}</span>
          {isOwner && principal !== birth ? (
            <select
              aria-label={`Role of ${principal}`}
              value={grant}
              onChange={event => {
                const chosen = event.currentTarget.value
                void attempt('Not changed', () =>
                  live.on.share(principal, chosen === 'none' ? null : (chosen as Grant))
                )
              }}
            >
              {ROLES.map(([value, label]) => (
                <option key={value} value={value}>
                  {label}
                </option>
              ))}
              <option value="none">Take the right away</option>
            </select>
          ) : (
            <span class="quiet-text">
              {principal === birth ? 'Made it' : ROLES.find(([value]) => value === grant)?.[1]}
            </span>
          )}
        </li>
      ))}
    </ul>
  )
}

function LinkForm({ client, live }: { client: LiveClient; live: LiveConversation }): JSX.Element {
  const [role, setRole] = useState<'writer' | 'reader'>('writer')
  const [name, setName] = useState('')
  const [lasts, setLasts] = useState(7 * DAY_MS)
  const [made, setMade] = useState<Invitation | null>(null)
  const make = (): Promise<boolean> =>
    attempt('No link was made', async () => {
      setMade(
        await client.on.invite(live.on.id, {
          role,
          ...(name.trim() ? { name: name.trim() } : {}),
          ...(lasts ? { expiresAt: Date.now() + lasts } : {})
        })
      )
    })
  if (made !== null) {
    return (
      <div class="made-link">
        <p>Whoever has this link is {made.principal}. It is shown once.</p>
        <div class="field-row">
          <input
            readOnly
            aria-label="Link"
            value={linkFor(made)}
            onFocus={event => event.currentTarget.select()}
          />
          <CopyButton text={() => linkFor(made)} label="Copy link" />
        </div>
        <div class="buttons">
          <button
            type="button"
            class="danger"
            onClick={() => {
              void attempt('Not withdrawn', async () => {
                await client.on.revoke(made.id)
                await live.on.share(made.principal, null)
                setMade(null)
              })
            }}
          >
            Withdraw the link
          </button>
          <button type="button" onClick={() => setMade(null)}>
            Another link
          </button>
        </div>
      </div>
    )
  }
  return (
    <form
      onSubmit={event => {
        event.preventDefault()
        void make()
      }}
    >
      <div class="field-row">
        <label>
          For whom
          <input
            value={name}
            maxLength={100}
            placeholder="a name, if you like"
            onInput={event => setName(event.currentTarget.value)}
          />
        </label>
        <label>
          May
          <select
            value={role}
            onChange={event =>
              setRole(event.currentTarget.value === 'reader' ? 'reader' : 'writer')
            }
          >
            <option value="writer">write</option>
            <option value="reader">read</option>
          </select>
        </label>
        <label>
          Lasts
          <select
            value={String(lasts)}
            onChange={event => setLasts(Number(event.currentTarget.value))}
          >
            {LASTING.map(([value, label]) => (
              <option key={value} value={String(value)}>
                {label}
              </option>
            ))}
          </select>
        </label>
      </div>
      <div class="buttons">
        <button type="submit" class="primary">
          Make a link
        </button>
      </div>
    </form>
  )
}

function PrincipalForm({ live }: { live: LiveConversation }): JSX.Element {
  const [principal, setPrincipal] = useState('')
  return (
    <form
      class="field-row"
      onSubmit={event => {
        event.preventDefault()
        void attempt('Not shared', () => live.on.share(principal.trim(), 'writer')).then(done => {
          if (done) setPrincipal('')
        })
      }}
    >
      <label>
        Somebody with an account here
        <input
          value={principal}
          maxLength={200}
          required
          onInput={event => setPrincipal(event.currentTarget.value)}
        />
      </label>
      <button type="submit">Add</button>
    </form>
  )
}

export function ShareForm({
  client,
  live
}: {
  client: LiveClient
  live: LiveConversation
}): JSX.Element {
  const isOwner = live.status.value.grant === 'owner'
  return (
    <div class="share">
      <section>
        <h3>Who may take part</h3>
        <Access live={live} />
        {isOwner && <PrincipalForm live={live} />}
      </section>
      {isOwner && (
        <section>
          <h3>Invite by link</h3>
          <LinkForm client={client} live={live} />
        </section>
      )}
    </div>
  )
}
