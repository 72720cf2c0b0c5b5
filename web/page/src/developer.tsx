// What is behind each entry, for people who build on this: digests and whether they hold, tokens and
// what they cost, and with the operator's key the hidden fields. Loaded only when it is opened.

import type { Entry, Verdict } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { useEffect, useState } from 'preact/hooks'
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

type Verdicts = ReadonlyMap<string, Verdict> | null

function EntryFacts({
  live,
  id,
  verdicts
}: {
  live: LiveConversation
  id: string
  verdicts: Verdicts
}): JSX.Element | null {
  const entry = live.entry(id).value
  if (entry === undefined) return null
  const verdict = verdicts?.get(id)
  const { usage } = entry
  return (
    <details class="entry-facts">
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
      <Facts entry={entry} />
    </details>
  )
}

export function DeveloperView({ live }: { live: LiveConversation }): JSX.Element {
  const [verdicts, setVerdicts] = useState<Verdicts>(null)
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
      <p class="quiet-text">
        <small>Tokens: reused + prefilled → sampled · time to the first.</small>
      </p>
      {path
        .slice(-shown)
        .reverse()
        .map(id => (
          <EntryFacts key={id} live={live} id={id} verdicts={verdicts} />
        ))}
      {path.length > shown && (
        <button type="button" onClick={() => setShown(shown + ENTRIES_AT_ONCE * 4)}>
          Show earlier entries
        </button>
      )}
    </div>
  )
}
