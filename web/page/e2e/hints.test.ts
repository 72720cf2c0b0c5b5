// What is being typed reaches the model before it is sent, if the person lets it, and not otherwise.

import { unpack } from 'crdt-llm-provider/msgpack'
import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { Device, launch, type Stack, sharedStack } from './stack'

const DRAFT = 6 // the kind of the frame; see crdt_llm/sync/wire/frames.py

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
})

test('drafts are hinted, and the switch stops that', async () => {
  const device = await Device.open(browser, stack)
  const drafts: string[] = []
  device.page.on('websocket', socket =>
    socket.on('framesent', ({ payload }) => {
      if (typeof payload === 'string') return
      const frame = unpack(payload) as unknown[]
      if (frame[0] === DRAFT) drafts.push(String(frame.at(-1)))
    })
  )
  await device.begin()
  await device.page.reload()
  await device.page.getByText('Online').waitFor()
  await device.composer.fill('What I am about to ask')
  await expect.poll(() => drafts.join('')).toContain('What I am about to ask')
  await device.page.getByRole('button', { name: 'Settings' }).click()
  await device.page.getByLabel(/read ahead while I type/).uncheck()
  await device.page.keyboard.press('Escape')
  await device.say('A message, so that what follows comes after it')
  await device.reply()
  drafts.length = 0
  await device.composer.fill('Nobody hears of this')
  await device.say('A message after it')
  await expect.poll(() => device.articles.count()).toBe(4)
  await device.reply()
  expect(drafts.join('')).not.toContain('Nobody')
  await device.page.reload()
  await device.page.getByRole('button', { name: 'Settings' }).click()
  expect(await device.page.getByLabel(/read ahead while I type/).isChecked()).toBe(false)
  await device.close()
})
