// How the page stands with its relay, in a few words.

import type { ClientStatus } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import type { LiveClient } from './live'
import { openSettings } from './overlays'

function words(status: ClientStatus): string {
  switch (status.state) {
    case 'online':
      return 'Online'
    case 'connecting':
      return 'Connecting…'
    case 'offline':
    case 'closed':
      return 'Offline'
    case 'refused':
      return status.reason || 'Not let in'
  }
}

export function ConnectionLine({ client }: { client: LiveClient }): JSX.Element {
  const status = client.status.value
  return (
    <div class={`connection ${status.state}`}>
      <span class="dot" aria-hidden="true" />
      <span class="connection-words" role="status">
        {words(status)}
      </span>
      {status.state === 'refused' && (
        <button type="button" class="link" onClick={openSettings}>
          Sign in
        </button>
      )}
      {status.state === 'offline' && (
        <button type="button" class="link" onClick={() => client.on.retry()}>
          Try now
        </button>
      )}
    </div>
  )
}
