// The developer view: digests that verify, what a reply cost, and hidden fields with the operator's key.

import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { Device, launch, type Stack, sharedStack } from './stack'

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
})

test('entries verify, and open with the key alone', async () => {
  const device = await Device.open(browser, stack)
  const { page } = device
  await device.begin()
  await device.say('What is behind this?')
  await device.reply()
  await page.keyboard.press('Control+Shift+D')
  const view = page.getByRole('complementary', { name: 'Developer view' })
  await view.getByRole('button', { name: 'Verify' }).click()
  await view.getByText('2 entries verified.').waitFor()
  await view.locator('summary').first().click()
  for (const fact of ['reused', 'prefilled', 'drafted', 'sampled', 'first token', 'digest']) {
    await view.locator(`dt:text-is("${fact}")`).waitFor()
  }
  const sampled = await view.locator('dt:text-is("sampled") + dd').innerText()

  await view.getByLabel('Key for hidden fields').fill('0'.repeat(64))
  await view.getByRole('button', { name: 'Open' }).click()
  await view.getByText(/It was sealed with the key/).waitFor()
  await view.getByRole('button', { name: 'Forget the key' }).click()

  await view.getByLabel('Key for hidden fields').fill(stack.masterKey)
  await view.getByRole('button', { name: 'Open' }).click()
  const kinds = await view.locator('dt:text-is("kinds") + dd').innerText()
  expect(kinds).toContain(`${sampled.split(' ')[0]} sampled`)
  expect(await view.locator('dt:text-is("params") + dd').innerText()).toContain('seed')

  // In memory alone: neither storage nor the next start know it.
  const stored = await page.evaluate(() => JSON.stringify(Object.entries(localStorage)))
  expect(stored).not.toContain(stack.masterKey)
  await page.reload()
  await device.composer.waitFor()
  await page.keyboard.press('Control+Shift+D')
  await view.getByLabel('Key for hidden fields').waitFor()
  await device.close()
})
