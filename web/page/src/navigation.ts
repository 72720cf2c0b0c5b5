// Where the page is: which conversation, which panel. It lives in the fragment of the address, which
// no request line carries, so a reload comes back to the same place and the back button works.

import { signal } from '@preact/signals'

export type Panel = 'map' | 'developer' | null

const idIn = (hash: string): string | null => {
  const named = new URLSearchParams(hash.replace(/^#/, '')).get('c')
  return named !== null && /^[\w-]{22}$/.test(named) ? named : null
}

/** The conversation that is shown; `null` is the list alone. */
export const current = signal<string | null>(idIn(location.hash))
export const panel = signal<Panel>(null)
/** On a narrow screen the list lies over the conversation. */
export const listShown = signal(current.value === null)

addEventListener('popstate', () => {
  current.value = idIn(location.hash)
  listShown.value = current.value === null
})

export const addressOf = (conversation: string): string => `#c=${conversation}`

export function goTo(conversation: string | null): void {
  listShown.value = conversation === null
  if (conversation === current.value) return
  history.pushState(null, '', conversation === null ? location.pathname : addressOf(conversation))
  current.value = conversation
}

/** The list again, on a narrow screen; the conversation stays open behind it. */
export function showList(): void {
  listShown.value = true
}

export function togglePanel(wanted: Exclude<Panel, null>): void {
  panel.value = panel.value === wanted ? null : wanted
}
