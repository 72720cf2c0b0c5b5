// What is said to people who listen to the page: whole replies and outcomes, never single tokens.

import { signal } from '@preact/signals'
import type { JSX } from 'preact'

const said = signal({ text: '', turn: 0 })

/** Says a line politely: it waits for what is being read out. */
export function announce(text: string): void {
  said.value = { text, turn: said.value.turn + 1 }
}

export function Announcer(): JSX.Element {
  const { text, turn } = said.value
  // The same line twice is two announcements only if the text differs.
  return (
    <div class="visually-hidden" role="status" aria-live="polite">
      {turn % 2 ? text : `${text}\u00a0`}
    </div>
  )
}
