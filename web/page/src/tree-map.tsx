// The tree as a graph of runs: a run is what stands between two forks. Each row is one, drawn on the
// lane of its depth, so that a conversation of thousands of messages is as small as its forks are few.

import type { Conversation } from 'crdt-llm-provider'
import type { JSX } from 'preact'
import { type LiveConversation, mayWrite } from './live'
import { attempt } from './notices'
import { plural } from './times'

const ROWS_MAX = 200 // more is no map
const LABEL_CHARACTERS = 80
const LANE_PX = 14
const ROW_PX = 44
const LANES_MAX = 10 // deeper ones share the last

export interface Run {
  readonly first: string
  readonly last: string
  readonly length: number
  readonly lane: number
  /** The row that it leaves; -1 for one that begins at the root. */
  readonly parent: number
  readonly isShown: boolean
  /** Whether a line ends here: then one can look at it, or show it to all. */
  readonly isTip: boolean
}

/** The runs of a conversation, each below the one it leaves, one lane further in. */
export function runsOf(on: Conversation): Run[] {
  const shown = new Set(on.view())
  const children = new Map<string, string[]>()
  const known = new Set<string>()
  for (const branch of on.branches().slice(0, ROWS_MAX)) {
    let up = ''
    for (const id of on.view(branch.tip)) {
      if (!known.has(id)) {
        known.add(id)
        const siblings = children.get(up)
        if (siblings === undefined) children.set(up, [id])
        else siblings.push(id)
      }
      up = id
    }
  }
  const runs: Run[] = []
  const stack = (children.get('') ?? []).map(first => ({ first, lane: 0, parent: -1 })).reverse()
  for (let next = stack.pop(); next !== undefined && runs.length < ROWS_MAX; next = stack.pop()) {
    let last = next.first
    let length = 1
    let after = children.get(last) ?? []
    while (after.length === 1 && after[0] !== undefined) {
      last = after[0]
      length += 1
      after = children.get(last) ?? []
    }
    const { lane } = next
    const row = runs.length
    runs.push({ ...next, last, length, isShown: shown.has(next.first), isTip: after.length === 0 })
    stack.push(...after.map(first => ({ first, lane: lane + 1, parent: row })).reverse())
  }
  return runs
}

const x = (lane: number): number => 10 + Math.min(lane, LANES_MAX) * LANE_PX
const y = (row: number): number => row * ROW_PX + ROW_PX / 2

function labelOf(on: Conversation, run: Run): string {
  const entry = on.entry(run.first)
  const text = entry?.content.trim().replace(/\s+/g, ' ').slice(0, LABEL_CHARACTERS)
  if (text) return text
  return entry?.standing === 'redacted' ? 'Withdrawn' : 'A reply without text'
}

export function TreeMap({ live }: { live: LiveConversation }): JSX.Element {
  live.structure.value // drawn again when the tree changes
  live.path.value
  const runs = runsOf(live.on)
  const lanes = Math.min(Math.max(0, ...runs.map(run => run.lane)), LANES_MAX)
  const width = x(lanes) + 10
  const byDefault = live.on.view(live.meta.value.head).at(-1)
  const mayLead = mayWrite(live)
  if (runs.length === 0) return <p class="empty">Nothing has been said yet.</p>
  return (
    <div class="tree-map">
      <svg width={width} height={runs.length * ROW_PX} aria-hidden="true" focusable="false">
        {runs.map((run, row) =>
          run.parent < 0 ? null : (
            <path
              key={`line-${run.first}`}
              class={run.isShown ? 'shown' : undefined}
              d={`M${x(run.lane - 1)} ${y(run.parent)}V${y(row) - 8}Q${x(run.lane - 1)} ${y(row)} ${x(run.lane)} ${y(row)}`}
            />
          )
        )}
        {runs.map((run, row) => (
          <circle
            key={run.first}
            class={run.isShown ? 'shown' : undefined}
            cx={x(run.lane)}
            cy={y(row)}
            r={5}
          />
        ))}
      </svg>
      <ul>
        {runs.map(run => (
          <li key={run.first} class={run.isShown ? 'shown' : undefined}>
            <button
              type="button"
              class="run"
              aria-current={run.isShown ? 'true' : undefined}
              onClick={() => live.look(run.last)}
            >
              <span class="run-label">{labelOf(live.on, run)}</span>
              <small>{plural(run.length, 'message')}</small>
            </button>
            {mayLead && run.isTip && run.isShown && live.on.branches().length > 1 && (
              <button
                type="button"
                class="link"
                disabled={byDefault === run.last}
                onClick={() => void attempt('Not changed', () => live.on.setHead(run.last))}
              >
                {byDefault === run.last ? 'Shown to all' : 'Show to all'}
              </button>
            )}
          </li>
        ))}
      </ul>
    </div>
  )
}
