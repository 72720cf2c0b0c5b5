// Markdown as blocks of tokens, parsed again only from the last block on while a text grows. This
// module owns the syntax and which addresses may be followed; it must not know components. Nothing
// here makes HTML: tokens become elements one by one elsewhere, so text can never become markup.

import MarkdownIt, { type Token } from 'markdown-it'

export type { Token }

/** A top-level block: a paragraph, a list, a code block … */
export interface Block {
  readonly source: string
  readonly tokens: readonly Token[]
}

export interface Parsed {
  readonly text: string
  readonly blocks: readonly Block[]
}

/** Longer texts are shown as they are: parsing them would hold the page up. */
export const FORMATTED_CHARACTERS_MAX = 64 * 1024

const FOLLOWED = /^(?:https?:\/\/|mailto:)/i

/** Whether an address may become a link: nothing that runs, nothing relative to this page. */
export const mayFollow = (address: string): boolean => FOLLOWED.test(address.trim())

const markdown = new MarkdownIt({ html: false, linkify: true })
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false })
markdown.validateLink = mayFollow

function blocksOf(text: string): Block[] {
  const tokens = markdown.parse(text, {})
  const starts: number[] = []
  for (let at = text.indexOf('\n'), line = 0; ; at = text.indexOf('\n', at + 1)) {
    if (line === 0) starts.push(0)
    if (at < 0) break
    starts.push(at + 1)
    line += 1
  }
  const groups: { start: number; tokens: Token[] }[] = []
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) {
      groups.push({ start: starts[token.map?.[0] ?? 0] ?? 0, tokens: [] })
    }
    groups.at(-1)?.tokens.push(token)
  }
  return groups.map((group, index) => ({
    source: text.slice(group.start, groups[index + 1]?.start ?? text.length),
    tokens: group.tokens
  }))
}

/**
 * The blocks of a text. With what the text was before, the blocks in front of its last one are kept
 * as they were; a text that has come to its end is best parsed without, since a link's definition
 * may follow its use.
 */
export function parse(text: string, before?: Parsed): Parsed {
  if (before?.text === text) return before
  const last = before?.blocks.at(-1)
  if (before === undefined || last === undefined || !text.startsWith(before.text)) {
    return { text, blocks: blocksOf(text) }
  }
  const kept = before.text.length - last.source.length
  return { text, blocks: [...before.blocks.slice(0, -1), ...blocksOf(text.slice(kept))] }
}
