// Without a network: the page opens, reads and writes, and what was written apart comes together.

import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { Device, launch, type Stack, startStack } from './stack'

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = await startStack()
  browser = await launch()
})

test('two devices write apart, with the server gone, and agree once it is back', async () => {
  const laptop = await Device.open(browser, stack, { name: 'Laptop' })
  const id = await laptop.begin()
  await laptop.say('Before')
  await laptop.reply()
  const phone = await Device.open(browser, stack, { name: 'Phone', at: id })
  await phone.reply()
  await laptop.cached()
  await phone.cached()
  await stack.stop('SIGKILL')
  for (const device of [laptop, phone]) {
    await device.page.reload()
    await device.page.getByText('Offline', { exact: true }).first().waitFor()
    expect((await device.texts())[0]).toBe('Before')
  }
  await laptop.say('From the laptop, offline')
  await phone.say('From the phone, offline')
  await laptop.page.getByText('Not stored at the relay yet', { exact: true }).waitFor()
  // What is written offline outlives a reload.
  await laptop.page.reload()
  await expect.poll(() => laptop.texts()).toContain('From the laptop, offline')
  await stack.start()
  for (const device of [laptop, phone]) {
    await device.page.evaluate(() => dispatchEvent(new Event('online')))
    await expect.poll(() => device.texts()).toContain('From the laptop, offline')
    await expect.poll(() => device.texts()).toContain('From the phone, offline')
    await expect
      .poll(() => device.page.getByText('Not stored at the relay yet', { exact: true }).count())
      .toBe(0)
  }
  await expect
    .poll(async () => {
      const [one, other] = [await laptop.texts(), await phone.texts()]
      return JSON.stringify(one) === JSON.stringify(other) && one.length
    })
    .toBeTruthy()
  await laptop.close()
  await phone.close()
})

test('a conversation that was begun offline is there for others later', async () => {
  const laptop = await Device.open(browser, stack)
  await laptop.page.getByText('Online').waitFor()
  await laptop.cached()
  await stack.stop()
  await laptop.page.reload()
  await laptop.page.getByText('Offline', { exact: true }).first().waitFor()
  const id = await laptop.begin()
  await laptop.say('Begun without a network')
  await laptop.page.getByText('Not stored at the relay yet', { exact: true }).waitFor()
  await stack.start()
  await laptop.page.evaluate(() => dispatchEvent(new Event('online')))
  const phone = await Device.open(browser, stack, { at: id })
  await expect.poll(() => phone.texts()).toContain('Begun without a network')
  await phone.reply()
  await laptop.close()
  await phone.close()
})
