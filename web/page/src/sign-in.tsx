// How a browser comes by a token that is not in its address.

import type { JSX } from 'preact'
import { useState } from 'preact/hooks'
import { use } from './identity'

export function TokenForm(): JSX.Element {
  const [token, setToken] = useState('')
  const [problem, setProblem] = useState('')
  return (
    <form
      onSubmit={event => {
        event.preventDefault()
        if (use(token)) location.reload()
        else setProblem('That is no token.')
      }}
    >
      <div class="field-row">
        <label>
          Token
          <input
            type="password"
            autocomplete="off"
            required
            value={token}
            onInput={event => setToken(event.currentTarget.value)}
          />
        </label>
        <button type="submit">Sign in</button>
      </div>
      <p class="failure" role="alert">
        {problem}
      </p>
    </form>
  )
}

/** What is shown to a browser that has no token at all. */
export function SignIn(): JSX.Element {
  return (
    <main class="sign-in">
      <h1>Conversations</h1>
      <p>
        This page needs a token. Open the link that was given to you, or the one that{' '}
        <code>crdt-llm serve</code> printed; or paste the token here.
      </p>
      <TokenForm />
    </main>
  )
}
