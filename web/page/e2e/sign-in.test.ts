// A browser without a token, with a wrong one, and with the right one.

import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { Device, launch, type Stack, sharedStack } from './stack'

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
})

test('a browser without a token is asked for one', async () => {
  const context = await browser.newContext()
  const page = await context.newPage()
  await page.goto(stack.url)
  await page.getByLabel('Token').fill('two words')
  await page.getByRole('button', { name: 'Sign in' }).click()
  await page.getByText('That is no token.').waitFor()
  await page.getByLabel('Token').fill(stack.token)
  await page.getByRole('button', { name: 'Sign in' }).click()
  await page.getByText('Online').waitFor()
  await context.close()
})

test('a wrong token is said to be one, and another can be given', async () => {
  const device = await Device.open(browser, stack, { token: 'a'.repeat(43) })
  const { page } = device
  await page.locator('.connection.refused').waitFor()
  await page.locator('.connection').getByRole('button', { name: 'Sign in' }).click()
  await page.getByText('Another account').click()
  await page.getByLabel('Token').fill(stack.token)
  await page.getByRole('dialog').getByRole('button', { name: 'Sign in' }).click()
  await page.getByText('Online').waitFor()
  await page.getByRole('button', { name: 'Settings' }).click()
  await page.getByRole('button', { name: 'Sign out' }).click()
  await page.getByRole('button', { name: /Delete everything here/ }).click()
  await page.getByText('This page needs a token.').waitFor()
  expect(await page.evaluate(() => Object.values(localStorage).join())).not.toContain(stack.token)
  await device.close()
})

test('signing out leaves nothing on the device', async () => {
  const device = await Device.open(browser, stack)
  const { page } = device
  await device.begin()
  await device.say('A diary')
  await device.composer.fill('Half a page')
  await page.getByRole('button', { name: 'Settings' }).click()
  await page.getByRole('button', { name: 'Sign out' }).click()
  await page.getByRole('button', { name: /Delete everything here/ }).click()
  await page.getByText('This page needs a token.').waitFor()
  expect(await page.evaluate(() => indexedDB.databases())).toEqual([])
  expect(await page.evaluate(() => JSON.stringify(Object.entries(localStorage)))).not.toContain(
    'Half'
  )
  await device.close()
})
