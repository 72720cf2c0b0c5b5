// What is shown to a browser that has no token.

import type { JSX } from 'preact'
import { useState } from 'preact/hooks'
import { use } from './identity'

export function SignIn(): JSX.Element {
  const [token, setToken] = useState('')
  const [problem, setProblem] = useState('')
  return (
    <main class="sign-in">
      <h1>Conversations</h1>
      <p>
        This page needs a token. Open the link that was given to you, or the one that{' '}
        <code>crdt-llm serve</code> printed; or paste the token here.
      </p>
      <form
        onSubmit={event => {
          event.preventDefault()
          if (use(token)) location.reload()
          else setProblem('That is no token.')
        }}
      >
        <label>
          Token
          <input
            type="password"
            autocomplete="current-password"
            required
            value={token}
            aria-describedby="token-problem"
            onInput={event => setToken(event.currentTarget.value)}
          />
        </label>
        <p id="token-problem" class="failure" role="alert">
          {problem}
        </p>
        <div class="buttons">
          <button type="submit" class="primary">
            Sign in
          </button>
        </div>
      </form>
    </main>
  )
}
