// For everyone: no serious finding of axe-core in any state of the page, and nothing that needs a mouse.

import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import type { Browser, BrowserContextOptions } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { hand } from './hand'
import { Device, launch, type Stack, sharedStack } from './stack'

interface Findings {
  readonly violations: readonly {
    id: string
    impact: string | null
    nodes: { html: string; failureSummary: string }[]
  }[]
}

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')

let stack: Stack
let browser: Browser
let conversation = ''

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
  const client = await hand(stack)
  const made = await client.create({ title: 'A conversation with some of everything' })
  await made.send(
    '# A heading\n\nA list:\n\n- one\n- two\n\n```py\nprint("code")  # coloured\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quoted, with a [link](https://example.org)'
  )
  const { slot } = await made.ask('A question')
  await made.settled()
  await new Promise<void>((done, failed) => {
    const look = (): void => {
      const { standing } = made.entry(slot) ?? {}
      if (standing === 'settled') done()
      else if (standing === 'failed') failed(new Error('the reply failed'))
    }
    made.on('change', look)
    look()
  })
  await made.regenerate(slot)
  await made.settled()
  conversation = made.id
  await client.close()
})

async function serious(device: Device): Promise<string[]> {
  // Not as an element: the page's policy forbids inline scripts, and that is as it should be.
  const found = (await device.page.evaluate(
    `${AXE}; axe.run(document, { resultTypes: ['violations'] })`
  )) as Findings
  return found.violations
    .filter(one => one.impact === 'serious' || one.impact === 'critical')
    .map(
      one => `${one.id}: ${one.nodes.map(node => `${node.html} ${node.failureSummary}`).join('\n')}`
    )
}

const looks: readonly [string, BrowserContextOptions][] = [
  ['light', { colorScheme: 'light' }],
  ['dark', { colorScheme: 'dark' }],
  ['narrow', { viewport: { width: 360, height: 700 } }]
]
for (const [name, options] of looks) {
  test(`axe-core finds nothing serious (${name})`, async () => {
    const device = await Device.open(browser, stack, { ...options, at: conversation })
    const { page } = device
    await device.reply()
    expect(await serious(device)).toEqual([])
    await page.getByRole('button', { name: 'Conversation', exact: true }).click()
    expect(await serious(device)).toEqual([])
    await page.getByRole('menuitem', { name: 'Share' }).click()
    expect(await serious(device)).toEqual([])
    await page.keyboard.press('Escape')
    await page.keyboard.press('Control+Shift+M')
    expect(await serious(device)).toEqual([])
    await page.keyboard.press('Control+Shift+D')
    await page.locator('.entry-facts summary').first().click()
    expect(await serious(device)).toEqual([])
    await page.keyboard.press('Escape')
    await page.keyboard.press('Control+k')
    if (name === 'narrow') expect(await serious(device)).toEqual([])
    await page.getByRole('button', { name: 'Settings' }).click()
    expect(await serious(device)).toEqual([])
    await page.keyboard.press('Escape')
    await page.getByRole('button', { name: 'Keyboard shortcuts' }).click()
    expect(await serious(device)).toEqual([])
    await device.close()
  })
}

const focused = (device: Device): Promise<string> =>
  device.page.evaluate(() => {
    const one = document.activeElement
    return one?.getAttribute('aria-label') || one?.textContent || ''
  })

test('everything is done by keyboard alone', async () => {
  const device = await Device.open(browser, stack, { at: conversation })
  const { page } = device
  const { keyboard } = page
  await device.reply()
  await keyboard.press('Tab')
  expect(await page.evaluate(() => document.activeElement?.textContent)).toBe(
    'To the message field'
  )
  await keyboard.press('Enter')
  await expect.poll(() => focused(device)).toBe('Message')

  // Write, and wait for the reply.
  await keyboard.press('Control+Shift+O')
  await expect.poll(() => device.conversation).not.toBe(conversation)
  await expect.poll(() => focused(device)).toBe('Message')
  await keyboard.type('By keyboard')
  await keyboard.press('Shift+Enter')
  await keyboard.type('in two lines')
  await keyboard.press('Enter')
  const first = await device.reply()
  expect((await device.texts())[0]).toBe('By keyboard\nin two lines')

  // To the last message, copy it, ask again, switch.
  await keyboard.press('ArrowUp')
  await expect.poll(() => focused(device)).toMatch(/^Reply/)
  await keyboard.press('c')
  await expect
    .poll(() => page.evaluate(() => (window as unknown as { copied: string }).copied))
    .toBeTruthy()
  await keyboard.press('r')
  await page.getByRole('group', { name: 'Version 2 of 2' }).waitFor()
  await device.reply()
  await device.lastReply.focus()
  await keyboard.press('ArrowLeft')
  await page.getByRole('group', { name: 'Version 1 of 2' }).waitFor()
  await expect.poll(() => device.lastReply.locator('.body').innerText()).toBe(first)
  await expect.poll(() => focused(device)).toMatch(/^Reply/)

  // Edit the message before.
  await keyboard.press('ArrowUp')
  await expect.poll(() => focused(device)).toMatch(/^You/)
  await keyboard.press('e')
  await expect.poll(() => focused(device)).toBe('Edit the message')
  await keyboard.press('Control+A')
  await keyboard.type('Edited by keyboard')
  await keyboard.press('Enter')
  await expect.poll(async () => (await device.texts())[0]).toBe('Edited by keyboard')
  await device.reply()

  // Withdraw it, through the dialog, which keeps the focus.
  await device.articles.first().focus()
  await keyboard.press('Delete')
  await page.getByRole('dialog').waitFor()
  for (let presses = 0; presses < 6; presses += 1) {
    await keyboard.press('Tab')
    expect(
      await page.evaluate(
        () =>
          document.activeElement?.closest('dialog') !== null ||
          document.activeElement === document.body
      )
    ).toBe(true)
  }
  await page.getByRole('dialog').getByRole('button', { name: 'Withdraw' }).focus()
  await keyboard.press('Enter')
  await page.getByText('This message was withdrawn').waitFor()

  // The menu, the list, and back.
  await page.getByRole('button', { name: 'Conversation', exact: true }).focus()
  await keyboard.press('Enter')
  await expect.poll(() => focused(device)).toContain('Rename')
  await keyboard.press('ArrowDown')
  await expect.poll(() => focused(device)).toContain('Share')
  await keyboard.press('Escape')
  await expect.poll(() => focused(device)).toBe('Conversation')
  await keyboard.press('Control+k')
  await expect.poll(() => focused(device)).toBe('Search conversations')
  await keyboard.type('everything')
  await keyboard.press('ArrowDown')
  await keyboard.press('Enter')
  await expect.poll(() => device.conversation).toBe(conversation)
  await device.close()
})

test('a finished reply is announced once, politely, and no token is', async () => {
  const device = await Device.open(browser, stack)
  await device.begin()
  await device.page.evaluate(() => {
    const said: string[] = []
    ;(window as unknown as { said: string[] }).said = said
    const region = document.querySelector('[aria-live]')
    if (region !== null) {
      new MutationObserver(() => said.push(region.textContent ?? '')).observe(region, {
        childList: true,
        characterData: true,
        subtree: true
      })
    }
  })
  await device.say('Say it once')
  const text = await device.reply()
  const said = (): Promise<string[]> =>
    device.page.evaluate(() => (window as unknown as { said: string[] }).said)
  await expect.poll(async () => (await said()).length).toBe(1)
  expect((await said())[0]).toMatch(/^Reply: /)
  expect(text.length).toBeGreaterThan(0)
  expect(await device.page.locator('[aria-live]').count()).toBe(1)
  await device.close()
})
