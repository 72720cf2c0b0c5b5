// What is behind each entry, for people who build on this: digests and whether they hold, tokens and
// what they cost, and with the operator's key the hidden fields. Loaded only when it is opened.

import type { Entry, Verdict } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { useEffect, useState } from 'preact/hooks'
import { type Hidden, keyIdOf, openReply, readKey } from './hidden'
import type { LiveConversation } from './live'
import { attempt } from './notices'
import { count, duration } from './times'

const ENTRIES_AT_ONCE = 30

export const hex = (bytes: Uint8Array): string =>
  Array.from(bytes, byte => byte.toString(16).padStart(2, '0')).join('')

const SHORT_DIGITS = 12

function Facts({ entry }: { entry: Entry }): JSX.Element {
  const { usage, proof, place, born } = entry
  const facts: [string, string][] = [
    ['id', entry.id],
    ['by', `${born.author} · ${born.device}`],
    ['clock', count(born.clock)],
    ['mode', born.fork ? 'fork' : 'continue'],
    ['after', born.after || 'the root'],
    [
      'place',
      place === null ? 'none yet' : `after ${place.parent || 'the root'}, epoch ${place.epoch}`
    ],
    ['digest', proof === null ? 'none yet' : hex(proof.digest)]
  ]
  if (usage !== null) {
    facts.push(
      ['prompt', `${count(usage.prompt)} tokens`],
      ['reused', `${count(usage.reused)} tokens`],
      ['prefilled', `${count(usage.prefilled)} tokens`],
      ['drafted', `${count(usage.drafted)} tokens`],
      ['sampled', `${count(usage.sampled)} tokens`],
      ['first token', usage.ttft_ms === null ? 'unknown' : duration(usage.ttft_ms)],
      ['in all', usage.total_ms === null ? 'unknown' : duration(usage.total_ms)],
      ['finish', usage.finish ?? 'unknown']
    )
    if (usage.error !== null) facts.push(['error', `${usage.error.code}: ${usage.error.message}`])
  }
  return (
    <dl>
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd class="mono">{value}</dd>
        </div>
      ))}
    </dl>
  )
}

const IDS_SHOWN_MAX = 400 // of a long reply the first ones tell enough

function HiddenFacts({ hidden }: { hidden: Hidden }): JSX.Element {
  const facts: [string, string][] = [
    ['model', hidden.model || 'in the first chunk'],
    ['renderer', hidden.renderer],
    [
      'params',
      Object.entries(hidden.params)
        .map(([name, value]) => `${name} ${plain(value)}`)
        .join(', ')
    ],
    ['kinds', hidden.kinds.map(([kind, times]) => `${count(times)} ${kind}`).join(', ')],
    [
      `${count(hidden.ids.length)} ids`,
      hidden.ids.slice(0, IDS_SHOWN_MAX).join(' ') + (hidden.ids.length > IDS_SHOWN_MAX ? ' …' : '')
    ],
    [
      'logprobs',
      hidden.logprobs
        .slice(0, IDS_SHOWN_MAX)
        .map(one => one.toFixed(2))
        .join(' ')
    ]
  ]
  return (
    <dl class="hidden-facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd class="mono">{value}</dd>
        </div>
      ))}
    </dl>
  )
}

/** Fractions come in a wrapper of their own, so that they stay apart from whole numbers. */
const plain = (value: unknown): string =>
  value !== null && typeof value === 'object' && 'value' in value
    ? String(value.value)
    : JSON.stringify(value)

function opened(live: LiveConversation, id: string, master: Uint8Array): Hidden | string {
  try {
    return openReply(master, live.on.id, id, live.on.sealed(id))
  } catch (error) {
    return error instanceof Error ? error.message : String(error)
  }
}

function HiddenFields({
  live,
  id,
  master
}: {
  live: LiveConversation
  id: string
  master: Uint8Array
}): JSX.Element {
  const hidden = opened(live, id, master)
  return typeof hidden === 'string' ? (
    <p class="failure">{hidden}</p>
  ) : (
    <HiddenFacts hidden={hidden} />
  )
}

function KeyForm({
  master,
  onKey
}: {
  master: Uint8Array | null
  onKey: (master: Uint8Array | null) => void
}): JSX.Element {
  const [problem, setProblem] = useState('')
  if (master !== null) {
    return (
      <div class="buttons">
        <small>
          Hidden fields open with the key <span class="mono">{keyIdOf(master)}</span>.
        </small>
        <button type="button" onClick={() => onKey(null)}>
          Forget the key
        </button>
      </div>
    )
  }
  return (
    <form
      class="key-form"
      onSubmit={event => {
        event.preventDefault()
        const field = event.currentTarget.elements.namedItem('key') as HTMLInputElement
        try {
          onKey(readKey(field.value))
        } catch (error) {
          setProblem(error instanceof Error ? error.message : String(error))
        }
        field.value = ''
      }}
    >
      <div class="field-row">
        <label>
          Key for hidden fields
          <input type="password" name="key" autocomplete="off" required />
        </label>
        <button type="submit">Open</button>
      </div>
      <small>It is kept in memory only, until this page is closed.</small>
      <p class="failure" role="alert">
        {problem}
      </p>
    </form>
  )
}

type Verdicts = ReadonlyMap<string, Verdict> | null

function EntryFacts({
  live,
  id,
  verdicts,
  master
}: {
  live: LiveConversation
  id: string
  verdicts: Verdicts
  master: Uint8Array | null
}): JSX.Element | null {
  const [isOpen, setOpen] = useState(false)
  const entry = live.entry(id).value
  if (entry === undefined) return null
  const verdict = verdicts?.get(id)
  const { usage } = entry
  return (
    <details class="entry-facts" onToggle={event => setOpen(event.currentTarget.open)}>
      <summary>
        <span class="role">{entry.born.role}</span>
        <span class="mono digest">
          {entry.proof === null ? entry.standing : hex(entry.proof.digest).slice(0, SHORT_DIGITS)}
        </span>
        {verdict !== undefined && (
          <span class={verdict.problem === null ? 'holds' : 'broken'}>
            {verdict.problem === null ? 'verified' : 'does not hold'}
          </span>
        )}
        {usage !== null && (
          <span class="cost mono">
            {count(usage.reused)} + {count(usage.prefilled)} → {count(usage.sampled)}
            {usage.ttft_ms === null ? '' : ` · ${duration(usage.ttft_ms)}`}
          </span>
        )}
      </summary>
      {verdict?.problem && <p class="failure">{verdict.problem}</p>}
      {isOpen && <Facts entry={entry} />}
      {isOpen && entry.isSlot && master !== null && (
        <HiddenFields live={live} id={id} master={master} />
      )}
    </details>
  )
}

export function DeveloperView({ live }: { live: LiveConversation }): JSX.Element {
  const [verdicts, setVerdicts] = useState<Verdicts>(null)
  const [master, setMaster] = useState<Uint8Array | null>(null)
  const [isChecking, setChecking] = useState(false)
  const [shown, setShown] = useState(ENTRIES_AT_ONCE)
  const path = live.path.value
  useEffect(() => setVerdicts(null), [live])
  const check = async (): Promise<void> => {
    setChecking(true)
    await attempt('Not verified', async () => {
      const found = await live.on.verify()
      setVerdicts(new Map(found.map(one => [one.entry, one])))
    })
    setChecking(false)
  }
  const broken = [...(verdicts?.values() ?? [])].filter(one => one.problem !== null).length
  return (
    <div class="developer">
      <div class="buttons">
        <small role="status">
          {verdicts === null
            ? 'Digests are shown as the document has them.'
            : broken === 0
              ? `${count(verdicts.size)} entries verified.`
              : `${count(broken)} of ${count(verdicts.size)} entries do not hold.`}
        </small>
        <button type="button" disabled={isChecking} onClick={() => void check()}>
          {isChecking ? 'Verifying…' : 'Verify'}
        </button>
      </div>
      <KeyForm master={master} onKey={setMaster} />
      <p class="quiet-text">
        <small>Tokens: reused + prefilled → sampled · time to the first.</small>
      </p>
      {path
        .slice(-shown)
        .reverse()
        .map(id => (
          <EntryFacts key={id} live={live} id={id} verdicts={verdicts} master={master} />
        ))}
      {path.length > shown && (
        <button type="button" onClick={() => setShown(shown + ENTRIES_AT_ONCE * 4)}>
          Show earlier entries
        </button>
      )}
    </div>
  )
}
