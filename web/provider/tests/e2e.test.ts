/** Two providers and the real relay. */

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import { type Client, type ClientOptions, type Conversation, openClient } from '../src/index.js'
import { Relay, until } from './relay.js'

const relay = new Relay()
const clients: Client[] = []

beforeAll(() => relay.start(), 60_000)
afterAll(async () => {
  await relay.stop()
  relay.remove()
}, 60_000)
afterEach(async () => {
  for (const client of clients.splice(0)) await client.close()
})

const client = async (more: Partial<ClientOptions> = {}): Promise<Client> => {
  const opened = await openClient(relay.options(more))
  clients.push(opened)
  return opened
}

const texts = (one: Conversation): string[] => one.entries().map(entry => entry.content)
const changes = (one: Conversation, holds: () => boolean): Promise<void> =>
  until(holds, look => one.on('change', look))
const statuses = (one: Conversation, holds: () => boolean): Promise<void> =>
  until(holds, look => one.on('status', look))

describe('two devices on a relay', () => {
  it('take every kind of write, and end up equal', async () => {
    const [here, there] = [await client(), await client()]
    const one = await here.create({ title: 'Groceries', policy: { reply: 'ask' }, model: 'm' })
    const first = await one.send('be brief', { role: 'system' })
    const { entry, slot } = await one.ask('What goes in?', {
      params: { max_tokens: 5, stop: ['.'] }
    })
    await one.stop(slot)
    const edited = await one.edit(entry, 'What goes into it?')
    const again = await one.regenerate(edited.slot)
    await one.request()
    await one.rename('Lasagne')
    await one.setPolicy({ overflow: 'drop_oldest' })
    await one.share('ann', 'reader')
    await one.redact(first)
    await one.settled()
    expect(one.refused).toEqual([])

    const two = await there.open(one.id)
    await two.synced()
    expect(two.view()).toEqual(one.view(one.meta.head))
    expect(two.meta).toEqual(one.meta)
    expect(two.meta).toMatchObject({
      title: 'Lasagne',
      policy: { overflow: 'drop_oldest' },
      head: again
    })
    expect(Object.fromEntries(two.access)).toEqual({ owner: 'owner', ann: 'reader' })
    expect(two.entry(first)).toMatchObject({ standing: 'redacted', content: '' })
    expect(two.entry(slot)).toMatchObject({ stop: 'owner', standing: 'stopped' })
    expect(two.entry(slot)?.born.params).toEqual({ max_tokens: 5, stop: ['.'] })

    await two.send('from the other side')
    await changes(one, () => texts(one).includes('from the other side'))
    expect(one.status).toMatchObject({ state: 'synced', unsent: 0, grant: 'owner' })
  })

  it('merge what was written offline on both sides, in one order', async () => {
    const [here, there] = [await client(), await client()]
    const one = await here.create()
    await one.send('zero')
    await one.settled()
    const two = await there.open(one.id)
    await two.synced()

    here.disconnect()
    there.disconnect()
    for (const text of ['a1', 'a2', 'a3']) await one.send(text)
    for (const text of ['b1', 'b2']) await two.send(text)
    expect(texts(one)).toEqual(['zero', 'a1', 'a2', 'a3'])
    expect(one.entries().map(entry => entry.standing)).toEqual([
      'pending',
      'unsent',
      'unsent',
      'unsent'
    ])
    expect(one.status).toMatchObject({ state: 'offline', unsent: 3 })
    here.retry()
    there.retry()
    await Promise.all([one, two].map(each => changes(each, () => each.view().length === 6)))
    await Promise.all([one.settled(), two.settled()])
    expect(two.view()).toEqual(one.view())
    expect(texts(one).sort()).toEqual(['a1', 'a2', 'a3', 'b1', 'b2', 'zero'])
    expect(one.entries().every(entry => entry.standing === 'pending')).toBe(true)
  })
})
