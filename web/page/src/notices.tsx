// Short lines at the edge of the page: what went wrong, and what somebody may want to know at once.

import { signal } from '@preact/signals'
import type { JSX } from 'preact'
import { Icon } from './icons'

interface Notice {
  readonly id: number
  readonly text: string
}

const NOTICES_MAX = 3 // older ones were read, or will not be
const SHOWN_MS = 8000

const notices = signal<readonly Notice[]>([])
let made = 0

const drop = (id: number): void => {
  notices.value = notices.value.filter(one => one.id !== id)
}

export function notify(text: string): void {
  made += 1
  const id = made
  notices.value = [...notices.value, { id, text }].slice(-NOTICES_MAX)
  setTimeout(() => drop(id), SHOWN_MS)
}

/** Runs what may fail; says so if it does. Answers whether it did not. */
export async function attempt(what: string, act: () => Promise<unknown>): Promise<boolean> {
  try {
    await act()
    return true
  } catch (error) {
    notify(`${what}: ${error instanceof Error ? error.message : String(error)}`)
    return false
  }
}

export function Notices(): JSX.Element {
  return (
    <div class="notices" role="alert">
      {notices.value.map(notice => (
        <div class="notice" key={notice.id}>
          <span>{notice.text}</span>
          <button
            type="button"
            class="icon-button"
            aria-label="Dismiss"
            onClick={() => drop(notice.id)}
          >
            <Icon name="close" />
          </button>
        </div>
      ))}
    </div>
  )
}
