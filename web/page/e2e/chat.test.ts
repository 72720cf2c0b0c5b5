// A conversation as people have it: written, answered, stopped, asked again, edited, seen elsewhere.

import type { Browser } from 'playwright-core'
import { beforeAll, expect, test } from 'vitest'
import { hand } from './hand'
import { Device, launch, type Stack, sharedStack } from './stack'

let stack: Stack
let browser: Browser

beforeAll(async () => {
  stack = sharedStack()
  browser = await launch()
})

/** A conversation with a reply on its way that takes a while, whatever the model samples. */
async function withLongReply(tokens = 3000): Promise<{ id: string; end: () => Promise<void> }> {
  const client = await hand(stack)
  const conversation = await client.create({ title: 'Long' })
  await conversation.ask('Go on and on', { params: { max_tokens: tokens, ignore_eos: true } })
  return { id: conversation.id, end: () => client.close() }
}

test('the token is kept, and gone from the address before anything else happens', async () => {
  const device = await Device.open(browser, stack)
  await device.page.getByText('Online').waitFor()
  expect(device.page.url()).not.toContain(device.token)
  expect(await device.page.evaluate(() => history.length)).toBeLessThan(4)
  await device.page.reload()
  await device.page.getByText('Online').waitFor()
  await device.close()
})

test('a token in the query is taken out of it too', async () => {
  const device = await Device.open(browser, stack)
  await device.page.getByText('Online').waitFor()
  const other = await browser.newContext()
  const page = await other.newPage()
  await page.goto(`${stack.url}/?token=${stack.token}&keep=1`)
  await page.getByText('Online').waitFor()
  expect(page.url()).toBe(`${stack.url}/?keep=1`)
  await other.close()
  await device.close()
})

test('a message is answered, and names the conversation', async () => {
  const device = await Device.open(browser, stack)
  await device.begin()
  await device.say('What is 6 times 7?')
  expect((await device.reply()).length).toBeGreaterThan(0)
  expect((await device.texts())[0]).toBe('What is 6 times 7?')
  await device.page.getByRole('link', { name: /What is 6 times 7\?/ }).waitFor()
  expect(await device.page.title()).toBe('What is 6 times 7?')
  // The node says that it is done, and how much of the conversation is warm.
  await device.page.locator('.node.idle').waitFor()
  expect(await device.page.locator('.node-warm').innerText()).toMatch(/^[\d,]+ \/ [\d,]+/)
  await device.close()
})

test('two devices see the same conversation as it happens', async () => {
  const laptop = await Device.open(browser, stack, { name: 'Laptop' })
  const id = await laptop.begin()
  const phone = await Device.open(browser, stack, { name: 'Phone', at: id })
  await laptop.say('From the laptop')
  await laptop.reply()
  await phone.say('From the phone')
  await expect.poll(() => phone.articles.count()).toBe(4)
  await phone.reply()
  await expect.poll(() => laptop.texts()).toEqual(await phone.texts())
  await laptop.page.getByLabel('Here now: Laptop (this one), Phone').waitFor()
  await laptop.close()
  await phone.close()
})

test('a reload in mid-reply loses nothing, doubles nothing, and the stream goes on', async () => {
  const { id, end } = await withLongReply()
  const device = await Device.open(browser, stack, { at: id })
  const text = (): Promise<string> => device.lastReply.locator('.body').innerText()
  await device.page.locator('article.streaming').waitFor()
  await expect.poll(async () => (await text()).length).toBeGreaterThan(200)
  const before = await text()
  await device.page.reload()
  await device.page.locator('article.streaming').waitFor()
  // What this device kept first, then what the relay has beyond it; the end of a text may still be
  // drawn otherwise (half a mark of Markdown), so its beginning is compared.
  await expect.poll(text).toContain(before.slice(0, 150))
  const after = await text()
  expect(after.startsWith(before.slice(0, 150))).toBe(true)
  await expect.poll(async () => (await text()).length).toBeGreaterThan(after.length)
  await device.page.getByRole('button', { name: 'Stop the reply' }).click()
  await device.reply()
  const other = await Device.open(browser, stack, { at: id })
  await other.reply()
  expect(await other.texts()).toEqual(await device.texts())
  expect(await device.articles.count()).toBe(2)
  await device.close()
  await other.close()
  await end()
})

test('a reply is stopped, keeps its text, and can go on', async () => {
  const { id, end } = await withLongReply()
  const device = await Device.open(browser, stack, { at: id })
  await device.page.locator('article.streaming').waitFor()
  await device.composer.press('Escape')
  await device.page.locator('article.stopped').waitFor()
  await device.page.getByText('Stopped', { exact: true }).waitFor()
  await device.page.getByRole('button', { name: 'Go on' }).click()
  await expect.poll(() => device.articles.count()).toBe(3)
  await device.page.locator('article.streaming, article.settled.assistant').first().waitFor()
  await device.close()
  await end()
})

test('asking again makes a sibling, and one switches between them', async () => {
  const device = await Device.open(browser, stack)
  await device.begin()
  await device.say('Tell me something')
  const first = await device.reply()
  await device.lastReply.hover()
  await device.lastReply.getByRole('button', { name: 'Ask again' }).click()
  await device.page.getByRole('group', { name: 'Version 2 of 2' }).waitFor()
  const second = await device.reply()
  expect(second).not.toBe(first)
  await device.page.getByRole('button', { name: 'Previous version' }).click()
  await device.page.getByRole('group', { name: 'Version 1 of 2' }).waitFor()
  await expect.poll(() => device.lastReply.locator('.body').innerText()).toBe(first)
  await device.page.getByRole('button', { name: 'Next version' }).click()
  await expect.poll(() => device.lastReply.locator('.body').innerText()).toBe(second)
  await device.close()
})

test('an edit is a branch beside the first version, and the map shows both', async () => {
  const device = await Device.open(browser, stack)
  await device.begin()
  await device.say('The first version')
  await device.reply()
  await device.articles.first().hover()
  await device.articles.first().getByRole('button', { name: 'Edit as a new branch' }).click()
  await device.page.getByLabel('Edit the message').fill('The second version')
  await device.page.getByLabel('Edit the message').press('Enter')
  await expect.poll(async () => (await device.texts())[0]).toBe('The second version')
  await device.reply()
  await device.page.keyboard.press('Control+Shift+M')
  const map = device.page.getByRole('complementary', { name: 'Branches' })
  await expect.poll(() => map.getByRole('listitem').count()).toBe(2)
  await map.getByRole('button', { name: /The first version/ }).click()
  await expect.poll(async () => (await device.texts())[0]).toBe('The first version')
  await device.close()
})

test('the list is live, searched, renamed and archived', async () => {
  const device = await Device.open(browser, stack)
  const other = await Device.open(browser, stack)
  await device.begin()
  await device.say('A needle for the search')
  await device.reply()
  const row = other.page.getByRole('link', { name: /A needle/ })
  await row.waitFor()
  await other.page.getByLabel('Search conversations').fill('NEEDLE')
  expect(await other.page.locator('.row').count()).toBe(1)
  await other.page.locator('.row').hover()
  await other.page.getByRole('button', { name: /^Actions for A needle/ }).click()
  await other.page.getByRole('menuitem', { name: 'Rename' }).click()
  await other.page.getByLabel('Title').fill('A pin, once a needle')
  await other.page.getByLabel('Title').press('Enter')
  await device.page.getByRole('heading', { name: 'A pin, once a needle' }).waitFor()
  await other.page.locator('.row').hover()
  await other.page.getByRole('button', { name: /^Actions for A pin/ }).click()
  await other.page.getByRole('menuitem', { name: 'Archive' }).click()
  await expect.poll(() => other.page.locator('.row').count()).toBe(0)
  await other.page.getByRole('button', { name: 'Show archived' }).click()
  await expect.poll(() => other.page.locator('.row').count()).toBe(1)
  await expect.poll(() => device.page.getByRole('link', { name: /A pin/ }).count()).toBe(0)
  await device.close()
  await other.close()
})

test('a withdrawn message is a marker on every device', async () => {
  const device = await Device.open(browser, stack)
  const id = await device.begin()
  const other = await Device.open(browser, stack, { at: id })
  await device.say('A secret')
  await device.reply()
  await device.articles.first().hover()
  await device.articles.first().getByRole('button', { name: 'Withdraw' }).click()
  await device.page.getByRole('dialog').getByRole('button', { name: 'Withdraw' }).click()
  for (const one of [device, other]) {
    await one.page.getByText('This message was withdrawn by owner.').waitFor()
    // The title was made of it, and goes with it.
    await expect.poll(() => one.page.locator('main').innerText()).not.toContain('A secret')
  }
  await device.close()
  await other.close()
})

test('messages and code are copied, and a conversation is saved', async () => {
  const device = await Device.open(browser, stack)
  await device.begin()
  await device.say('Look:')
  await device.reply()
  const text = 'Some `code`:\n\n```js\nconst six = 2 * 3\n```'
  await device.composer.fill(text)
  await device.composer.press('Enter')
  const message = device.page.locator('article.message.user').last()
  await message.getByRole('button', { name: 'Copy code' }).click()
  const copied = () => device.page.evaluate(() => (window as unknown as { copied: string }).copied)
  await expect.poll(copied).toBe('const six = 2 * 3')
  await message.hover()
  await message.getByRole('button', { name: 'Copy message' }).click()
  await expect.poll(copied).toBe(text)
  const download = device.page.waitForEvent('download')
  await device.page.getByRole('button', { name: 'Conversation', exact: true }).click()
  await device.page.getByRole('menuitem', { name: 'Save as Markdown' }).click()
  expect((await download).suggestedFilename()).toBe('Look.md')
  await device.close()
})

test('what was typed and not sent is there after a reload', async () => {
  const device = await Device.open(browser, stack)
  await device.begin()
  await device.composer.fill('Half a thought')
  await device.page.reload()
  await expect.poll(() => device.composer.inputValue()).toBe('Half a thought')
  await device.close()
})

test('two tabs of one browser are one device that sees everything at once', async () => {
  const device = await Device.open(browser, stack)
  const id = await device.begin()
  await device.say('In the first tab')
  await device.reply()
  const tab = await device.context.newPage()
  await tab.goto(`${stack.url}/#c=${id}`)
  await tab.getByText('In the first tab').first().waitFor()
  await tab.getByLabel('Message', { exact: true }).fill('In the second tab')
  await tab.getByLabel('Message', { exact: true }).press('Enter')
  await expect.poll(() => device.texts()).toContain('In the second tab')
  await expect.poll(() => device.articles.count()).toBe(4)
  await device.reply()
  await expect.poll(() => tab.locator('article.message').count()).toBe(4)
  await device.close()
})
