// The pictures of the README, of the page as it is. With a folder named for them they are taken with the
// default model, so that the replies are replies; else nothing is written, and the tiny model will do.

import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Conversation } from 'crdt-llm-provider'
import type { Browser, BrowserContextOptions } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { hand } from './hand'
import { Device, launch, type Stack, startStack } from './stack'

const FOLDER = process.env.CRDT_LLM_SCREENSHOTS
const MODELS =
  process.env.CRDT_LLM_MODELS ?? fileURLToPath(new URL('../../../.venv/models', import.meta.url))

let stack: Stack
let browser: Browser
let shown: Conversation

const OTHERS = [
  'A weekend in Lisbon',
  'Rename the billing tables',
  'Notes for the talk',
  'Bread that does not rise'
]
const QUESTIONS = [
  'What is a hash table? Two sentences, please.',
  'Write a Python function that reverses a string.'
]
const PARAMS = { max_tokens: 240, temperature: 0 }

/** Asks, and waits for the end of the reply. */
async function asked(question: string): Promise<void> {
  await ended((await shown.ask(question, { params: PARAMS })).slot)
}

async function ended(slot: string): Promise<void> {
  await new Promise<void>((done, failed) => {
    const look = (): void => {
      const { standing } = shown.entry(slot) ?? {}
      if (standing === 'settled') done()
      else if (standing === 'failed') failed(new Error('the reply failed'))
    }
    shown.on('change', look)
    look()
  })
}

beforeAll(async () => {
  // With a list of its own.
  stack = await startStack(FOLDER === undefined ? undefined : join(MODELS, 'smollm2-135m'))
  browser = await launch()
  const client = await hand(stack, { device: 'Laptop' })
  for (const title of OTHERS) await (await client.create({ title })).settled()
  shown = await client.create({ title: 'Hash tables, and strings reversed' })
  for (const question of QUESTIONS) await asked(question)
  const [, first] = shown.view()
  await ended(await shown.regenerate(first ?? ''))
  // The new version is beside what is shown, not instead of it.
  await shown.setHead(null)
  shown.look(null)
  await shown.settled()
}, 300_000)

const looks: readonly [string, BrowserContextOptions, string][] = [
  ['light', { colorScheme: 'light', viewport: { width: 1120, height: 720 } }, ''],
  ['dark', { colorScheme: 'dark', viewport: { width: 1280, height: 720 } }, 'Control+Shift+M'],
  ['narrow', { colorScheme: 'dark', viewport: { width: 390, height: 720 } }, '']
]
for (const [name, options, key] of looks) {
  test(`a picture of the page (${name})`, async () => {
    const device = await Device.open(browser, stack, { ...options, name: 'Phone', at: shown.id })
    await expect.poll(() => device.articles.count()).toBe(QUESTIONS.length * 2)
    await device.page.locator('.people').waitFor()
    await device.page.locator('.node.idle').waitFor()
    if (key) await device.page.keyboard.press(key)
    await device.composer.blur()
    if (FOLDER !== undefined) {
      mkdirSync(FOLDER, { recursive: true })
      await device.page.screenshot({ path: join(FOLDER, `${name}.png`), animations: 'disabled' })
    }
    await device.close()
  })
}
