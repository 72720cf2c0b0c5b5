// What this browser remembers of how the page should look and behave, and of unsent text. Storage may
// be full or forbidden: then the page works, and forgets.

import { effect, type Signal, signal } from '@preact/signals'

export type Theme = 'system' | 'light' | 'dark'

const PREFIX = 'crdt-llm.'

export function remembered(key: string): string | null {
  try {
    return localStorage.getItem(PREFIX + key)
  } catch {
    return null
  }
}

/** Whether it was kept. */
export function remember(key: string, value: string | null): boolean {
  try {
    if (value === null) localStorage.removeItem(PREFIX + key)
    else localStorage.setItem(PREFIX + key, value)
    return true
  } catch {
    return false
  }
}

function setting<Value extends string>(
  key: string,
  first: Value,
  known: readonly Value[]
): Signal<Value> {
  const stored = remembered(key)
  const value = signal(known.find(one => one === stored) ?? first)
  effect(() => {
    remember(key, value.value === first ? null : value.value)
  })
  return value
}

export const theme = setting<Theme>('theme', 'system', ['system', 'light', 'dark'])
/** Whether what is being typed is hinted to the node, so that it can read ahead. */
export const hints = setting('hints', 'on', ['on', 'off'])

effect(() => {
  const root = document.documentElement
  if (theme.value === 'system') root.removeAttribute('data-theme')
  else root.setAttribute('data-theme', theme.value)
})

let keepsUnsent = true

/** Text that was typed and not sent, by conversation. */
export const unsent = {
  read: (conversation: string): string => remembered(`unsent.${conversation}`) ?? '',
  write: (conversation: string, text: string): void => {
    if (keepsUnsent) remember(`unsent.${conversation}`, text || null)
  },
  /** Forgets all of it, and keeps no more: a page that is left would write its own once again. */
  forget: (): void => {
    keepsUnsent = false
    try {
      for (const one of Object.keys(localStorage)) {
        if (one.startsWith(`${PREFIX}unsent.`)) localStorage.removeItem(one)
      }
    } catch {
      // Storage is forbidden: nothing was kept.
    }
  }
}
