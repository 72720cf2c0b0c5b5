// Colours for code, by the few forms that most languages share. This module owns guesses that can only
// be wrong in colour: whatever it does, the text that comes out is the text that went in.

import type { ComponentChildren } from 'preact'

// Longer code is shown in one colour: each word would be an element.
const COLOURED_CHARACTERS_MAX = 8 * 1024

const HASH_COMMENTS =
  /^(?:py|python|sh|bash|shell|zsh|rb|ruby|yaml|yml|toml|make|makefile|dockerfile|perl|r|elixir)$/
const DASH_COMMENTS = /^(?:sql|lua|haskell|hs|ada)$/
const NO_COLOURS = /^(?:|text|txt|plain|plaintext|output|console|markdown|md|diff)$/

const KEYWORDS = new Set(
  (
    'abstract and as assert async await break case catch class const continue def default del do elif else enum ' +
    'except export extends false finally fn for from func function if impl implements import in interface is ' +
    'lambda let loop match mod mut new nil None not null of or package pass private protected pub public raise ' +
    'return self static struct super switch this throw trait true True False try type typeof use var void where ' +
    'while with yield select insert update delete into values join on group by order limit create table'
  ).split(' ')
)

const STRING = /"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|`(?:[^`\\]|\\.)*`?/.source
const NUMBER = /\b\d[\w.]*/.source
const WORD = /[A-Za-z_$][\w$]*/.source

const patterns = new Map<string, RegExp>()

function patternFor(language: string): RegExp {
  const comment = HASH_COMMENTS.test(language)
    ? '#[^\\n]*'
    : DASH_COMMENTS.test(language)
      ? '--[^\\n]*'
      : '\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)'
  let pattern = patterns.get(comment)
  if (pattern === undefined) {
    pattern = new RegExp(`(${comment})|(${STRING})|(${NUMBER})|(${WORD})`, 'g')
    patterns.set(comment, pattern)
  }
  return pattern
}

export function highlight(code: string, language: string): ComponentChildren {
  const named = language.toLowerCase()
  if (NO_COLOURS.test(named) || code.length > COLOURED_CHARACTERS_MAX) return code
  const parts: ComponentChildren[] = []
  let done = 0
  for (const found of code.matchAll(patternFor(named))) {
    const [text, comment, string, number, word] = found
    const kind = comment
      ? 'comment'
      : string
        ? 'string'
        : number
          ? 'number'
          : word && KEYWORDS.has(word)
            ? 'keyword'
            : null
    if (kind === null) continue
    parts.push(code.slice(done, found.index), <span class={`code-${kind}`}>{text}</span>)
    done = found.index + text.length
  }
  parts.push(code.slice(done))
  return parts
}
