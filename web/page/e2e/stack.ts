// What the tests stand on: a real server (see server.ts), and Debian's Chromium. Nothing here is a stand-in:
// relay, node and page are the real ones. What is begun here ends after a file's last test, whatever
// failed, and a test that fails shows what the server said.

import {
  type Browser,
  type BrowserContext,
  type BrowserContextOptions,
  chromium,
  type Page
} from 'playwright-core'
import { afterAll, afterEach, expect, inject } from 'vitest'
import { Server } from './server'

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium'
/** What a person would wait for; a machine with other work takes a while. */
const WAIT_MS_MAX = 30_000
const SHOWN_CHARACTERS_MAX = 4_000 // of what a server said

export type Stack = Server

const servers = new Set<Server>()
const ends: (() => Promise<unknown>)[] = []

/** Has something ended after the file's last test; what was begun last ends first. */
export const ending = (end: () => Promise<unknown>): void => void ends.push(end)

afterAll(async () => {
  const failures: unknown[] = []
  for (const end of ends.splice(0).reverse()) await end().catch(error => failures.push(error))
  if (failures.length > 0) throw new AggregateError(failures, failures.join('; '))
})

afterEach(({ task }) => {
  if (task.result?.state !== 'fail') return
  for (const { url, messages } of servers) {
    process.stderr.write(`${url} said:\n${messages.slice(-SHOWN_CHARACTERS_MAX)}\n`)
  }
})

/** The server with the tiny model that other files use too: it cannot be stopped. */
export function sharedStack(): Stack {
  const server = new Server(inject('model'), inject('shared'))
  servers.add(server)
  return server
}

/** A server for this file alone, with the tiny model or another. */
export async function startStack(model = inject('model')): Promise<Stack> {
  const server = new Server(model)
  servers.add(server)
  ending(() => server.remove())
  await server.start()
  return server
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

export async function launch(): Promise<Browser> {
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS })
  ending(() => browser.close())
  return browser
}

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
    context.setDefaultTimeout(WAIT_MS_MAX)
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
    // Without a bound `ready` would wait for ever for a worker whose installation failed.
    await this.page.waitForFunction(async () => {
      const worker = (await navigator.serviceWorker.getRegistration())?.active
      return worker?.state === 'activated' && (await caches.keys()).length > 0
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
