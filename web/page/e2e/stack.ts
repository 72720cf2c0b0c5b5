// What the tests stand on: `crdt-llm serve` as a user runs it, with a tiny model of random weights, and
// Debian's Chromium. Nothing here is a stand-in: relay, node and page are the real ones.

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import {
  createWriteStream,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import {
  type Browser,
  type BrowserContext,
  type BrowserContextOptions,
  chromium,
  type Page
} from 'playwright-core'
import { expect, vi } from 'vitest'

const ROOT = fileURLToPath(new URL('../../../', import.meta.url))
const PYTHON = process.env.CRDT_LLM_PYTHON ?? join(ROOT, '.venv/bin/python')
const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium'
const READY_MS_MAX = 120_000

/** More positions than the tiny model has, so that long conversations fit its context. */
const POSITIONS = 131_072

/** Makes the tiny model, and gives it room. */
function buildModel(folder: string): string {
  const model = join(folder, 'tiny')
  const made = spawnSync(
    PYTHON,
    [
      '-c',
      'import sys; from pathlib import Path; from tiny_model import build_tiny_model; build_tiny_model(Path(sys.argv[1]))',
      model
    ],
    { env: { ...process.env, PYTHONPATH: join(ROOT, 'tests') }, encoding: 'utf8' }
  )
  if (made.status !== 0) throw new Error(`no tiny model: ${made.stderr}`)
  for (const [name, key] of [
    ['config.json', 'max_position_embeddings'],
    ['tokenizer_config.json', 'model_max_length']
  ] as const) {
    const path = join(model, name)
    const config = JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>
    writeFileSync(path, JSON.stringify({ ...config, [key]: POSITIONS }))
  }
  return model
}

export class Stack {
  url = ''
  #process: ChildProcess | null = null
  #port = 0
  readonly #folder = mkdtempSync(join(tmpdir(), 'crdt-llm-page-'))
  readonly #model: string | null

  private constructor(node: boolean | string) {
    this.#model = node === true ? buildModel(this.#folder) : node || null
  }

  /** With the tiny model, with a model in a folder, or without a node. */
  static async start({ node = true as boolean | string } = {}): Promise<Stack> {
    const stack = new Stack(node)
    await stack.start()
    return stack
  }

  get data(): string {
    return join(this.#folder, 'data')
  }

  get token(): string {
    return readFileSync(join(this.data, 'owner.token'), 'utf8').trim()
  }

  /** The operator's key for hidden fields, as hexadecimal digits. */
  get masterKey(): string {
    return readFileSync(join(this.data, 'keys/master.key')).toString('hex')
  }

  get messages(): string {
    const path = join(this.#folder, 'serve.log')
    return existsSync(path) ? readFileSync(path, 'utf8') : ''
  }

  async start(): Promise<void> {
    const words = ['-m', 'crdt_llm', 'serve', '--data', this.data, '--port', String(this.#port)]
    words.push(...(this.#model === null ? ['--no-node'] : ['--model', this.#model]))
    const child = spawn(PYTHON, words, { stdio: ['ignore', 'pipe', 'pipe'] })
    this.#process = child
    child.stderr?.pipe(createWriteStream(join(this.#folder, 'serve.log'), { flags: 'a' }))
    const ready = (async () => {
      for await (const line of createInterface({ input: child.stdout as NodeJS.ReadableStream })) {
        if (line.startsWith('ready ')) return line.split(' ')[1] ?? ''
      }
      throw new Error(`the server ended: ${this.messages}`)
    })()
    const late = setTimeout(() => child.kill('SIGKILL'), READY_MS_MAX)
    this.url = new URL(await ready).origin
    clearTimeout(late)
    this.#port = Number(new URL(this.url).port)
    if (this.#model !== null) await this.#untilNodeIsReady()
  }

  async #untilNodeIsReady(): Promise<void> {
    await vi.waitFor(
      async () => {
        const { status } = await fetch(`${this.url}/readyz`)
        if (status !== 200) throw new Error(this.messages)
      },
      { timeout: READY_MS_MAX, interval: 100 }
    )
  }

  /** A signed token of somebody else. */
  tokenOf(principal: string): string {
    const words = ['-m', 'crdt_llm', 'token', 'issue', principal, '--data', this.data, '--json']
    const made = spawnSync(PYTHON, words, { encoding: 'utf8' })
    if (made.status !== 0) throw new Error(`no token: ${made.stderr}`)
    return (JSON.parse(made.stdout) as { token: string }).token
  }

  /** Ends the server; with SIGKILL as a power cut does. */
  async stop(signal: 'SIGTERM' | 'SIGKILL' = 'SIGTERM'): Promise<void> {
    const child = this.#process
    if (child === null || child.exitCode !== null || child.signalCode !== null) return
    const ended = once(child, 'exit')
    child.kill(signal)
    await ended
  }

  async remove(): Promise<void> {
    await this.stop()
    rmSync(this.#folder, { recursive: true, force: true })
  }
}

const FLAGS = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync'
]

export const launch = (): Promise<Browser> =>
  chromium.launch({ executablePath: CHROMIUM, args: FLAGS })

/** A browser of its own, with storage of its own: one device of one person. */
export class Device {
  /** What no page may do: errors, violations of the policy, requests to strangers, tokens in requests. */
  readonly offences: string[] = []

  private constructor(
    readonly stack: Stack,
    readonly context: BrowserContext,
    readonly page: Page,
    readonly token: string
  ) {}

  static async open(
    browser: Browser,
    stack: Stack,
    options: BrowserContextOptions & { name?: string; token?: string; at?: string } = {}
  ): Promise<Device> {
    const { name = 'Device', token = stack.token, at, ...rest } = options
    const context = await browser.newContext({ viewport: { width: 1200, height: 800 }, ...rest })
    context.setDefaultTimeout(20_000)
    await context.addInitScript(device => {
      localStorage.setItem('crdt-llm.device', device)
      // A clipboard of this page's own: the real one is one for all tests.
      Object.defineProperty(navigator, 'clipboard', {
        value: {
          writeText: async (text: string) => {
            ;(window as unknown as { copied: string }).copied = text
          }
        }
      })
    }, name)
    const page = await context.newPage()
    const device = new Device(stack, context, page, token)
    device.#watch()
    await page.goto(`${stack.url}/#${new URLSearchParams({ ...(at ? { c: at } : {}), token })}`)
    return device
  }

  #watch(): void {
    const note = (offence: string): void => void this.offences.push(offence)
    this.page.on('pageerror', error => note(`error: ${error.message}`))
    this.page.on('dialog', dialog => {
      note(`a dialog: ${dialog.message()}`)
      void dialog.dismiss()
    })
    this.page.on('console', message => {
      const text = message.text()
      // What the browser itself says of a server that is gone.
      if (message.type() === 'error' && !/net::ERR_|WebSocket connection/.test(text))
        note(`console: ${text}`)
    })
    this.context.on('request', request => {
      const url = request.url()
      if (
        !url.startsWith('blob:') &&
        !url.startsWith('data:') &&
        new URL(url).origin !== this.stack.url
      ) {
        note(`a request to a stranger: ${url}`)
      }
      if (url.includes(this.token)) note(`the token in a request: ${url}`)
    })
  }

  async close(): Promise<void> {
    await this.context.close()
    expect(this.offences).toEqual([])
  }

  /** Waits until the worker has the page, so that the next visit needs no network. */
  async cached(): Promise<void> {
    await this.page.evaluate(async () => {
      await navigator.serviceWorker.ready
      while ((await caches.keys()).length === 0) await new Promise(done => setTimeout(done, 20))
    })
  }

  // -- what a person does ----------------------------------------------------------------------

  get composer() {
    return this.page.getByLabel('Message', { exact: true })
  }

  get articles() {
    return this.page.locator('article.message')
  }

  get lastReply() {
    return this.page.locator('article.message.assistant').last()
  }

  get conversation(): string {
    return new URLSearchParams(new URL(this.page.url()).hash.slice(1)).get('c') ?? ''
  }

  async begin(): Promise<string> {
    await this.page.getByRole('button', { name: 'New conversation', exact: true }).click()
    await this.composer.waitFor()
    return this.conversation
  }

  async say(text: string): Promise<void> {
    await this.composer.fill(text)
    await this.composer.press('Enter')
  }

  /** Waits until the last reply has ended, and answers its text. */
  async reply(): Promise<string> {
    await this.page
      .locator('article.message.assistant.settled, article.message.assistant.stopped')
      .last()
      .waitFor()
    await expect.poll(() => this.lastReply.getAttribute('class')).toMatch(/settled|stopped|failed/)
    return this.lastReply.locator('.body').innerText()
  }

  texts(): Promise<string[]> {
    return this.page.locator('article.message .body').allInnerTexts()
  }
}
