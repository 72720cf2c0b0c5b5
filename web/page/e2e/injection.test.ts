// Whoever writes a field, it stays text: no element, no script, no request, no dialog comes of it. Where
// our relay would refuse it, a hostile relay is played: its frames are put into the page's own socket.

import { pack } from 'crdt-llm-provider/msgpack'
import type { Browser, WebSocketRoute } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import * as Y from 'yjs'
import { hand } from './hand'
import { Device, launch, type Stack, sharedStack } from './stack'

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
})

const evil = (name: string): string =>
  `${name}<img src=x onerror="document.title='owned'"><script>alert(1)</script><svg/onload=alert(2)>"'>`

const MARKDOWN = [
  evil('text'),
  '[a](javascript:alert(1)) [b](data:text/html,<script>alert(1)</script>) [c](vbscript:x) [d](/relative)',
  '<javascript:alert(1)> <a href="javascript:alert(1)">e</a>',
  '![f](https://stranger.example/pixel.png) ![g](javascript:alert(1)) ![h](data:image/svg+xml,x)',
  '[i]: javascript:alert(1)\n\n[i] [j](JaVaScRiPt:alert(1)) [k]( javascript:alert(1)) [l](&#106;avascript:alert(1))',
  '`<img src=x onerror=alert(1)>`',
  '```"><img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```',
  '| <script>alert(1)</script> | b |\n|:-:|--:|\n| <img src=x onerror=alert(1)> | [x](javascript:alert(1)) |',
  '<iframe src="https://stranger.example"></iframe><style>*{display:none}</style>',
  'https://example.org/"onmouseover="alert(1) <https://example.org/ok>'
].join('\n\n')

/** What must hold of the whole document, whatever it shows. */
async function holds(device: Device): Promise<void> {
  const found = await device.page.evaluate(() => ({
    title: document.title,
    bad: [
      ...document.body.querySelectorAll(
        'script, iframe, img, style, object, embed, link, base, form[action]'
      )
    ].map(one => one.outerHTML),
    handlers: [...document.querySelectorAll('*')].flatMap(one =>
      one
        .getAttributeNames()
        .filter(name => /^on/i.test(name) || name === 'style' || name === 'srcdoc')
    ),
    links: [...document.querySelectorAll('.formatted a, .plain a')].map(one => ({
      address: one.getAttribute('href') ?? '',
      rel: one.getAttribute('rel') ?? ''
    }))
  }))
  expect(found.title).not.toBe('owned')
  expect(found.bad).toEqual([])
  expect(found.handlers).toEqual([])
  for (const { address, rel } of found.links) {
    expect(address).toMatch(/^(https?:\/\/|mailto:)/)
    expect(rel).toContain('noopener')
  }
}

test('title, message, device and principal are text', async () => {
  const client = await hand(stack, { device: evil('device').slice(0, 200) })
  const conversation = await client.create({ title: evil('title') })
  await conversation.send(MARKDOWN)
  await conversation.send(MARKDOWN, { role: 'system' })
  await conversation.share(evil('principal').slice(0, 200), 'reader')
  const device = await Device.open(browser, stack, {
    at: conversation.id,
    name: evil('own').slice(0, 200)
  })
  await expect.poll(() => device.articles.count()).toBe(2)
  await holds(device)
  expect(await device.page.locator('.formatted a').first().getAttribute('href')).toMatch(/^https:/)
  await device.page.getByRole('button', { name: 'Conversation', exact: true }).click()
  await device.page.getByRole('menuitem', { name: 'Share' }).click()
  await device.page.getByText('principal<img').waitFor()
  await holds(device)
  await device.page.keyboard.press('Escape')
  await device.page.keyboard.press('Control+Shift+M')
  await holds(device)
  await device.page.keyboard.press('Control+Shift+D')
  await device.page.locator('.entry-facts summary').first().click()
  await holds(device)
  await device.close()
  await client.close()
})

/** An update that puts an entry of a hostile relay's choice into a document. */
function hostileEntry(
  id: string,
  born: Record<string, unknown>,
  fields: Record<string, unknown>
): Uint8Array {
  const doc = new Y.Doc()
  const entry = new Y.Map<unknown>()
  doc.getMap('entries').set(id, entry)
  entry.set('born', born)
  for (const [name, value] of Object.entries(fields)) {
    entry.set(
      name,
      name === 'content' && born.role === 'assistant' ? new Y.Text(String(value)) : value
    )
  }
  return Y.encodeStateAsUpdate(doc)
}

test('what a hostile relay says is text: roles, states, errors, presence, refusals, the list', async () => {
  const client = await hand(stack)
  const conversation = await client.create({ title: 'Target' })
  await conversation.send('Hello')
  await conversation.settled()
  const device = await Device.open(browser, stack)
  let route: WebSocketRoute | null = null
  let isDeaf = false
  await device.page.routeWebSocket(/.*/, socket => {
    const server = socket.connectToServer()
    socket.onMessage(message => {
      if (!isDeaf) server.send(message)
    })
    server.onMessage(message => socket.send(message))
    route = socket
  })
  await device.page.goto(`${stack.url}/#c=${conversation.id}`)
  await device.page.reload()
  await expect.poll(() => device.articles.count()).toBe(1)
  await expect.poll(() => device.page.getByText('Online').count()).toBe(1)
  const send = (...frame: unknown[]): void => route?.send(Buffer.from(pack(frame)))
  const born = { author: evil('author'), device: evil('device'), at: Date.now(), mode: 'continue' }
  const ids = [
    '01KZZZZZZZZZZZZZZZZZZZZZZ1',
    '01KZZZZZZZZZZZZZZZZZZZZZZ2',
    '01KZZZZZZZZZZZZZZZZZZZZZZ3',
    '01KZZZZZZZZZZZZZZZZZZZZZZ4'
  ] as const
  let lsn = 1000
  const change = (update: Uint8Array): void => send(34, 1, ++lsn, update)
  change(
    hostileEntry(ids[0], { ...born, role: evil('role'), clock: 900 }, { content: evil('content') })
  )
  change(
    hostileEntry(
      ids[1],
      { ...born, role: 'assistant', clock: 901 },
      {
        content: MARKDOWN,
        state: 'failed',
        place: { parent: '', epoch: 1 },
        usage: {
          prompt: 1,
          prefilled: 1,
          reused: 0,
          drafted: 0,
          sampled: 0,
          ttft_ms: 1,
          total_ms: 1,
          finish: evil('finish'),
          error: { code: evil('code'), message: evil('error') }
        }
      }
    )
  )
  change(
    hostileEntry(
      ids[2],
      { ...born, role: 'tool', clock: 902, call: evil('call') },
      { content: evil('tool') }
    )
  )
  change(
    hostileEntry(
      ids[3],
      { ...born, role: 'user', clock: 903 },
      { redacted: { by: evil('by'), at: 1 } }
    )
  )
  send(5, 1, [
    [7, 1, JSON.stringify({ device: evil('device') })],
    [
      8,
      1,
      JSON.stringify({
        node: { model: evil('model'), doing: evil('doing'), warm: 1, tokens: 2, queue: 0 }
      })
    ]
  ])
  send(40, true, true, [
    [
      conversation.id,
      {
        title: evil('list'),
        role: 'owner',
        owner: evil('owner'),
        created_at: 1,
        changed_at: 1,
        archived: false
      }
    ]
  ])
  await expect.poll(() => device.articles.count()).toBeGreaterThan(1)
  await device.page.keyboard.press('Control+Shift+M')
  await holds(device)
  await device.page.keyboard.press('Control+Shift+D')
  await device.page.locator('.entry-facts summary').first().click()
  await holds(device)
  // From here on nothing reaches our relay, which would take the write.
  isDeaf = true
  await device.say('A write that is refused')
  await device.page.getByText('Not stored at the relay yet', { exact: true }).waitFor()
  send(36, 1, 1, 'denied', evil('rule').slice(0, 200), evil('reason'), null, null)
  await device.page.getByText('reason<img').waitFor()
  await holds(device)
  send(39, 1, 4403, evil('closed'))
  await device.page.getByText('closed<img').waitFor()
  await holds(device)
  await device.close()
  await client.close()
})

test('the policy of the page is strict, and a script in it does not run', async () => {
  const device = await Device.open(browser, stack)
  const policy = (await (await fetch(stack.url)).headers.get('content-security-policy')) ?? ''
  expect(policy).toContain("default-src 'self'")
  expect(policy).not.toContain('unsafe')
  const ran = await device.page.evaluate(() => {
    const script = document.createElement('script')
    script.textContent = 'window.ran = true'
    document.head.append(script)
    return (window as unknown as { ran?: boolean }).ran === true
  })
  expect(ran).toBe(false)
  device.offences.length = 0 // the browser has just said so
  await device.close()
})
