// Where the page begins: who this is, then the provider, then the first drawing.

import './styles.css'
import { openClient } from 'crdt-llm-provider'
import { render } from 'preact'
import { App, followNavigation } from './app'
import { deviceName, identities, takeTokenFromAddress } from './identity'
import { LiveClient } from './live'
import { notify } from './notices'
import { hints } from './settings'
import { SignIn } from './sign-in'

takeTokenFromAddress()

async function start(): Promise<void> {
  const root = document.getElementById('page')
  if (root === null) throw new Error('the document has no place for the page')
  const identity = identities()[0]
  if (identity === undefined) {
    render(<SignIn />, root)
    return
  }
  const client = new LiveClient(
    await openClient({
      url: location.origin,
      token: identity.token,
      device: deviceName(),
      profile: identity.profile,
      hints: hints.value === 'on',
      ...(identity.principal ? { principal: identity.principal } : {})
    })
  )
  followNavigation(client)
  render(<App client={client} />, root)
}

void start()

if ('serviceWorker' in navigator && import.meta.env.PROD) {
  // Without one (plain http from afar, a private window) the page works while there is a network.
  navigator.serviceWorker.register('/sw.js').catch(() => undefined)
  // What is open goes on with the build that it began with.
  const isNews = navigator.serviceWorker.controller !== null
  navigator.serviceWorker.addEventListener('controllerchange', () => {
    if (isNews) notify('There is a new version of this page: reload it when you like.')
  })
}
