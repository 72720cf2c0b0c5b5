// The pictures of the README, of the page as it is. Written only where a folder is named for them, so that
// a run of the tests changes nothing.

import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Conversation } from 'crdt-llm-provider'
import type { Browser, BrowserContextOptions } from 'playwright-core'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { hand } from './hand'
import { Device, launch, Stack } from './stack'

const FOLDER = process.env.CRDT_LLM_SCREENSHOTS

let stack: Stack
let browser: Browser
let shown: Conversation
let end: () => Promise<void>

const PAGES: readonly [string, string][] = [
  ['A weekend in Lisbon', 'Where should we eat on Sunday?'],
  ['Rename the billing tables', 'Which migration goes first?'],
  ['Notes for the talk', 'Shorten the second part.'],
  ['Bread that does not rise', 'The dough stays flat. Why?']
]

const TURNS: readonly [string, string][] = [
  [
    'I have a list of pairs in Python and want the **largest value for each key**. What is the shortest way?',
    'Go through the pairs once and keep the larger value of each key:\n\n```python\ndef largest(pairs):\n    best = {}\n    for key, value in pairs:\n        best[key] = max(value, best.get(key, value))\n    return best\n```\n\nIt takes one pass, and keys may come in any order.'
  ],
  [
    'And what if the list does not fit into memory?',
    'Then it still works, as long as the *keys* fit: read the pairs one by one from a file and pass the iterator.\n\n| what grows | with |\n|---|---|\n| time | pairs |\n| memory | keys |\n\nFor more keys than memory, sort the file by key first and keep only one at a time.'
  ]
]

beforeAll(async () => {
  stack = await Stack.start({ node: false })
  browser = await launch()
  const client = await hand(stack, { device: 'Laptop' })
  end = () => client.close()
  for (const [title, text] of PAGES) {
    const made = await client.create({ title })
    await made.send(text)
    await made.settled()
  }
  shown = await client.create({ title: 'The largest value for each key' })
  for (const [question, answer] of TURNS) {
    await shown.send(question)
    await shown.send(answer, { role: 'system' })
  }
  await shown.settled()
})
afterAll(async () => {
  await end()
  await browser.close()
  await stack.remove()
})

const looks: readonly [string, BrowserContextOptions, string][] = [
  ['light', { colorScheme: 'light', viewport: { width: 1120, height: 720 } }, ''],
  ['dark', { colorScheme: 'dark', viewport: { width: 1120, height: 720 } }, 'Control+Shift+M'],
  ['narrow', { colorScheme: 'dark', viewport: { width: 390, height: 720 } }, '']
]
for (const [name, options, key] of looks) {
  test(`a picture of the page (${name})`, async () => {
    const device = await Device.open(browser, stack, { ...options, name: 'Phone', at: shown.id })
    await expect.poll(() => device.articles.count()).toBe(TURNS.length * 2)
    await device.page.locator('.people').waitFor()
    if (key) await device.page.keyboard.press(key)
    await device.composer.blur()
    if (FOLDER !== undefined) {
      mkdirSync(FOLDER, { recursive: true })
      await device.page.screenshot({ path: join(FOLDER, `${name}.png`), animations: 'disabled' })
    }
    await device.close()
  })
}
