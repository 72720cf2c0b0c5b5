// Others: a link with a role, what it lets its holder do, and its end; and several accounts in a browser.

import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { Device, launch, type Stack, sharedStack } from './stack'

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
})

/** The owner's device with a conversation, and the token of a link to it. */
async function invited(
  role: 'write' | 'read'
): Promise<{ owner: Device; id: string; token: string }> {
  const owner = await Device.open(browser, stack, { name: 'Owner' })
  const id = await owner.begin()
  await owner.say('Come in')
  await owner.page.getByRole('button', { name: 'Conversation', exact: true }).click()
  await owner.page.getByRole('menuitem', { name: 'Share' }).click()
  await owner.page.getByLabel('For whom').fill('Ada')
  await owner.page.getByLabel('May').selectOption({ label: role })
  await owner.page.getByRole('button', { name: 'Make a link' }).click()
  const link = new URL(await owner.page.getByLabel('Link', { exact: true }).inputValue())
  const fragment = new URLSearchParams(link.hash.slice(1))
  expect(fragment.get('c')).toBe(id)
  expect(link.search).toBe('')
  return { owner, id, token: fragment.get('token') ?? '' }
}

test('whoever has the link writes, until it is withdrawn', async () => {
  const { owner, id, token } = await invited('write')
  const guest = await Device.open(browser, stack, { name: 'Guest', token, at: id })
  await expect.poll(() => guest.texts()).toContain('Come in')
  await guest.say('Here I am')
  await expect.poll(() => owner.texts()).toContain('Here I am')
  await owner.page.getByRole('button', { name: 'Withdraw the link' }).click()
  await owner.page.getByRole('button', { name: 'Make a link' }).waitFor()
  await expect
    .poll(() => guest.page.locator('.connection.refused, .banner').count())
    .toBeGreaterThan(0)
  await owner.close()
  await guest.close()
})

test('a link to read lets nobody write', async () => {
  const { owner, id, token } = await invited('read')
  const guest = await Device.open(browser, stack, { token, at: id })
  await expect.poll(() => guest.texts()).toContain('Come in')
  await guest.page.getByText('You can read this conversation').waitFor()
  expect(await guest.composer.count()).toBe(0)
  await guest.articles.first().hover()
  expect(await guest.page.getByRole('button', { name: 'Withdraw' }).count()).toBe(0)
  await owner.close()
  await guest.close()
})

test('one browser keeps the data of its accounts apart', async () => {
  const { owner, id, token } = await invited('write')
  await owner.page.keyboard.press('Escape')
  const list = owner.page.locator('.row')
  await expect.poll(() => list.count()).toBeGreaterThan(0)
  const before = await list.count()
  await owner.page.goto(`${stack.url}/#${new URLSearchParams({ c: id, token })}`)
  await owner.page.reload()
  await expect.poll(() => owner.texts()).toContain('Come in')
  await expect.poll(() => list.count()).toBe(1)
  await owner.page.getByRole('button', { name: 'Settings' }).click()
  await owner.page.getByRole('button', { name: 'Switch' }).click()
  await expect.poll(() => list.count()).toBe(before)
  await owner.close()
})
