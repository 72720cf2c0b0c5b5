// A button that copies a text, and says that it has.

import type { JSX } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import { announce } from './announcer'
import { Icon } from './icons'

const SHOWN_MS = 1500

/** Copies; where the browser has no clipboard for this page (plain http), by a selection. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    const field = document.createElement('textarea')
    field.value = text
    field.className = 'visually-hidden'
    document.body.append(field)
    field.select()
    const copied = document.execCommand('copy')
    field.remove()
    return copied
  }
}

export function CopyButton({
  text,
  label,
  tabIndex
}: {
  text: () => string
  label: string
  tabIndex?: number
}): JSX.Element {
  const [copied, setCopied] = useState(false)
  const timer = useRef(0)
  useEffect(() => () => clearTimeout(timer.current), [])
  const copy = async (): Promise<void> => {
    const done = await copyText(text())
    announce(done ? 'Copied' : 'This browser did not let the page copy')
    if (!done) return
    setCopied(true)
    clearTimeout(timer.current)
    timer.current = window.setTimeout(() => setCopied(false), SHOWN_MS)
  }
  return (
    <button
      type="button"
      class="icon-button"
      aria-label={label}
      title={label}
      tabIndex={tabIndex ?? 0}
      onClick={() => void copy()}
    >
      <Icon name={copied ? 'check' : 'copy'} />
    </button>
  )
}
