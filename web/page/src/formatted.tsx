// A text as elements: Markdown's blocks, each rendered once as long as its source stays the same.
// This module owns which elements a text may become. Every one is made by name from the lists below,
// and its text is a text node: no HTML is ever parsed, no address is loaded unless somebody clicks.

import { Component, type ComponentChildren, createElement, type JSX } from 'preact'
import { useRef, useState } from 'preact/hooks'
import { CopyButton } from './copy'
import { highlight } from './highlight'
import {
  type Block,
  FORMATTED_CHARACTERS_MAX,
  mayFollow,
  type Parsed,
  parse,
  type Token
} from './markdown'

const TAGS = new Set([
  'p',
  'strong',
  'em',
  's',
  'code',
  'blockquote',
  'ul',
  'ol',
  'li',
  'hr',
  'br',
  'table',
  'thead',
  'tbody',
  'tr',
  'th',
  'td'
])
// The page has headings of its own: those of a text begin below them.
const HEADINGS: Record<string, 'h3' | 'h4' | 'h5' | 'h6'> = {
  h1: 'h3',
  h2: 'h4',
  h3: 'h5',
  h4: 'h6',
  h5: 'h6',
  h6: 'h6'
}
const ALIGNED: Record<string, string> = {
  'text-align:left': 'left',
  'text-align:center': 'centre',
  'text-align:right': 'right'
}

/** A link that says where it goes, opens apart from the page, and tells the other side nothing. */
function Link({
  address,
  children
}: {
  address: string
  children: ComponentChildren
}): JSX.Element {
  if (!mayFollow(address)) return <span>{children}</span>
  return (
    <a href={address} title={address} target="_blank" rel="noopener noreferrer nofollow">
      {children}
    </a>
  )
}

/** An image is a request to a stranger: it is named, and left to the reader to open. */
function Image({ token }: { token: Token }): JSX.Element {
  const address = attribute(token, 'src')
  const name = plainText(token.children ?? []) || 'image'
  return (
    <span class="image-link">
      <Link address={address}>Image: {name}</Link>
    </span>
  )
}

function Code({ source, language }: { source: string; language: string }): JSX.Element {
  const code = source.replace(/\n$/, '')
  return (
    <figure class="code">
      <figcaption>
        <span>{language || 'text'}</span>
        <CopyButton text={() => code} label="Copy code" />
      </figcaption>
      {/* A long line scrolls, so the block must be reachable by keyboard. */}
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: else its end cannot be read */}
      <pre tabIndex={0}>
        <code>{highlight(code, language)}</code>
      </pre>
    </figure>
  )
}

const attribute = (token: Token, name: string): string =>
  String(token.attrs?.find(([key]) => key === name)?.[1] ?? '')

const plainText = (tokens: readonly Token[]): string =>
  tokens.map(token => (token.children ? plainText(token.children) : token.content)).join('')

function elements(tokens: readonly Token[]): ComponentChildren[] {
  // Open elements, the innermost last; tokens come flat and balanced.
  const stack: { open: Token | null; children: ComponentChildren[] }[] = [
    { open: null, children: [] }
  ]
  for (const token of tokens) {
    const inner = stack.at(-1)
    if (inner === undefined) break
    if (token.nesting === 1) {
      stack.push({ open: token, children: [] })
    } else if (token.nesting === -1) {
      stack.pop()
      const outer = stack.at(-1)
      if (outer !== undefined && inner.open !== null)
        outer.children.push(wrap(inner.open, inner.children))
    } else {
      inner.children.push(leaf(token))
    }
  }
  return stack[0]?.children ?? []
}

function wrap(open: Token, children: ComponentChildren[]): ComponentChildren {
  if (open.hidden) return children // the paragraphs of a tight list
  if (open.tag === 'a') return <Link address={attribute(open, 'href')}>{children}</Link>
  const heading = HEADINGS[open.tag]
  if (heading !== undefined) return createElement(heading, null, children)
  if (open.tag === 'table') {
    return (
      // biome-ignore lint/a11y/noNoninteractiveTabindex: a wide table scrolls, as code does
      <section class="table" tabIndex={0} aria-label="Table">
        <table>{children}</table>
      </section>
    )
  }
  if (!TAGS.has(open.tag)) return children
  if (open.tag === 'ol') return <ol start={Number(attribute(open, 'start') || 1)}>{children}</ol>
  const aligned = ALIGNED[attribute(open, 'style')]
  return createElement(open.tag, aligned ? { class: `align-${aligned}` } : null, children)
}

function leaf(token: Token): ComponentChildren {
  switch (token.type) {
    case 'inline':
      return elements(token.children ?? [])
    case 'text':
    case 'text_special':
      return token.content
    case 'softbreak':
      return '\n'
    case 'hardbreak':
      return <br />
    case 'hr':
      return <hr />
    case 'code_inline':
      return <code>{token.content}</code>
    case 'fence':
      return <Code source={token.content} language={token.info.trim().split(/\s+/, 1)[0] ?? ''} />
    case 'code_block':
      return <Code source={token.content} language="" />
    case 'image':
      return <Image token={token} />
    default:
      return token.content
  }
}

class BlockView extends Component<{ block: Block }> {
  override shouldComponentUpdate(next: { block: Block }): boolean {
    return next.block !== this.props.block && next.block.source !== this.props.block.source
  }

  override render(): ComponentChildren {
    return elements(this.props.block.tokens)
  }
}

/** A text as Markdown; `growing` while more of it is to come; with `breaks` lines end as typed. */
export function Formatted({
  text,
  growing,
  breaks = false
}: {
  text: string
  growing: boolean
  breaks?: boolean
}): JSX.Element {
  const before = useRef<{ parsed: Parsed; growing: boolean } | undefined>(undefined)
  if (text.length > FORMATTED_CHARACTERS_MAX) return <Plain text={text} />
  const kept = before.current
  const reusable = kept !== undefined && (growing || !kept.growing) ? kept.parsed : undefined
  const parsed = parse(text, reusable)
  before.current = { parsed, growing }
  return (
    <div class={breaks ? 'formatted breaks' : 'formatted'}>
      {parsed.blocks.map((block, index) => (
        <BlockView key={index} block={block} />
      ))}
    </div>
  )
}

const SHOWN_CHARACTERS = 16 * 1024 // some screens of text; laying out a megabyte takes seconds

/** A text as it was written, line by line; of a very long one the beginning until asked for more. */
export function Plain({ text }: { text: string }): JSX.Element {
  const [shown, setShown] = useState(SHOWN_CHARACTERS)
  return (
    <div class="plain">
      {text.length > shown ? text.slice(0, shown) : text}
      {text.length > shown && (
        <button type="button" class="quiet" onClick={() => setShown(shown * 4)}>
          Show more of {Math.ceil(text.length / 1024)} KiB
        </button>
      )}
    </div>
  )
}
