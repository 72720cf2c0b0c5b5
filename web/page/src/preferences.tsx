// Settings of this browser: looks, hints, the device's name, and who one is.

import type { JSX } from 'preact'
import { useState } from 'preact/hooks'
import { deviceName, erase, identities, nameDevice, use } from './identity'
import type { LiveClient } from './live'
import { hints, type Theme, theme } from './settings'
import { TokenForm } from './sign-in'

const THEMES: readonly [Theme, string][] = [
  ['system', 'As the system'],
  ['light', 'Light'],
  ['dark', 'Dark']
]

/** Accounts are chosen at the start: the data of one must never mix with another's. */
const startAgain = (): void => location.reload()

/** Two clicks: what was not sent would be lost with the rest. */
function SignOut({ client }: { client: LiveClient }): JSX.Element {
  const [isSure, setSure] = useState(false)
  const signOut = async (): Promise<void> => {
    const here = identities()[0]
    await client.on.close()
    if (here !== undefined) await erase(here.profile)
    startAgain()
  }
  return isSure ? (
    <button type="button" class="danger" onClick={() => void signOut()}>
      Delete everything here, also what is not sent
    </button>
  ) : (
    <button type="button" onClick={() => setSure(true)}>
      Sign out
    </button>
  )
}

export function SettingsForm({ client }: { client: LiveClient }): JSX.Element {
  const [name, setName] = useState(deviceName())
  const others = identities().slice(1)
  return (
    <div class="settings">
      <fieldset class="choice">
        <legend>Appearance</legend>
        {THEMES.map(([value, label]) => (
          <label key={value}>
            <input
              type="radio"
              name="theme"
              checked={theme.value === value}
              onChange={() => {
                theme.value = value
              }}
            />
            {label}
          </label>
        ))}
      </fieldset>
      <label class="switch">
        <input
          type="checkbox"
          checked={hints.value === 'on'}
          onChange={event => {
            hints.value = event.currentTarget.checked ? 'on' : 'off'
          }}
        />
        <span>
          Let the model read ahead while I type
          <small>
            What you type goes to the model before you send it. It is never stored, and nobody else
            sees it.
          </small>
        </span>
      </label>
      <form
        class="field-row"
        onSubmit={event => {
          event.preventDefault()
          nameDevice(name)
          startAgain()
        }}
      >
        <label>
          Name of this device
          <input
            value={name}
            maxLength={200}
            onInput={event => setName(event.currentTarget.value)}
          />
        </label>
        <button type="submit" disabled={name.trim() === deviceName()}>
          Save
        </button>
      </form>
      <section>
        <h3>Account</h3>
        <ul class="people-list">
          <li>
            <span>{client.status.value.principal ?? 'not known yet'}</span>
            <SignOut client={client} />
          </li>
          {others.map(one => (
            <li key={one.profile}>
              <span>{one.principal || 'another account'}</span>
              <button
                type="button"
                onClick={() => {
                  use(one.token)
                  startAgain()
                }}
              >
                Switch
              </button>
            </li>
          ))}
        </ul>
        <details>
          <summary>Another account</summary>
          <TokenForm />
        </details>
      </section>
    </div>
  )
}
