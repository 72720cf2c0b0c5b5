// A write that the relay refuses costs nobody their text.

import type { Client, Conversation } from 'crdt-llm-provider'
import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { hand } from './hand'
import { Device, launch, type Stack, sharedStack } from './stack'

let stack: Stack
let browser: Browser
let owner: Client

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
  owner = await hand(stack)
})

/** Ada writes offline what she may no longer write once she is back. */
async function refused(): Promise<{ ada: Device; conversation: Conversation }> {
  const conversation = await owner.create({ title: 'Shared' })
  await conversation.share('ada', 'writer')
  await conversation.settled()
  const ada = await Device.open(browser, stack, {
    token: stack.tokenOf('ada'),
    at: conversation.id
  })
  await ada.page.getByRole('heading', { name: 'Shared' }).waitFor()
  await ada.cached()
  await ada.context.setOffline(true)
  await ada.page.reload()
  await ada.page.getByText('Offline', { exact: true }).first().waitFor()
  await ada.say('Words that took an hour')
  await ada.page.getByText('Not stored at the relay yet', { exact: true }).waitFor()
  await conversation.share('ada', 'reader')
  await conversation.settled()
  await ada.context.setOffline(false)
  await ada.page.evaluate(() => dispatchEvent(new Event('online')))
  await ada.page.getByRole('region', { name: 'Not taken' }).waitFor()
  return { ada, conversation }
}

test('the text is shown, copied, and dropped by the person alone', async () => {
  const { ada } = await refused()
  const tray = ada.page.getByRole('region', { name: 'Not taken' })
  expect(await tray.innerText()).toContain('Words that took an hour')
  expect(await ada.articles.count()).toBe(0)
  await ada.page.getByText('You can read this conversation').waitFor()
  await tray.getByRole('button', { name: 'Copy the text' }).click()
  await expect
    .poll(() => ada.page.evaluate(() => (window as unknown as { copied: string }).copied))
    .toBe('Words that took an hour')
  await ada.page.reload()
  await expect.poll(() => tray.innerText()).toContain('Words that took an hour')
  await tray.getByRole('button', { name: 'Drop' }).click()
  await expect.poll(() => tray.count()).toBe(0)
  await ada.page.reload()
  await ada.page.getByText('You can read this conversation').waitFor()
  expect(await tray.count()).toBe(0)
  await ada.close()
})

test('it is sent again once it may be', async () => {
  const { ada, conversation } = await refused()
  await conversation.share('ada', 'writer')
  await ada.composer.waitFor()
  const tray = ada.page.getByRole('region', { name: 'Not taken' })
  await tray
    .locator('.refused-write', { hasText: 'Words that took an hour' })
    .getByRole('button', { name: 'Send again' })
    .click()
  await expect
    .poll(() => conversation.entries().map(one => one.content))
    .toContain('Words that took an hour')
  await expect.poll(() => ada.texts()).toContain('Words that took an hour')
  await ada.close()
})
