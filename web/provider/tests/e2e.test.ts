/** Two providers and the real relay. */

import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import {
  type Client,
  type ClientOptions,
  type Conversation,
  MemoryStore,
  openClient
} from '../src/index.js'
import { NO_PROFILE } from '../src/store.js'
import { DeafLine, Relay, until } from './relay.js'

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

  it('tell each other who is here, and who left', async () => {
    const [here, there] = [await client({ device: 'phone' }), await client({ device: 'laptop' })]
    const one = await here.create()
    await one.settled()
    const two = await there.open(one.id)
    const devices = (): string[] => two.presence.map(each => each.device).sort()
    const presence = (look: () => void): (() => void) => two.on('presence', look)
    await until(() => devices().join() === 'laptop,phone', presence)
    await one.close()
    await until(() => devices().join() === 'laptop', presence)
  })
})

describe('nothing is lost and nothing is there twice', () => {
  it('when the line breaks before the acknowledgement', async () => {
    const line = new DeafLine()
    const [here, there] = [await client({ socket: line.socket }), await client()]
    const one = await here.create()
    await one.settled()
    const two = await there.open(one.id)
    await two.synced()
    line.deaf = true
    await one.send('heard by all but us')
    await changes(two, () => texts(two).length === 1)
    expect(one.status.unsent).toBe(1)
    line.deaf = false
    line.cut()
    await one.settled()
    await two.send('after that')
    await changes(one, () => texts(one).length === 2)
    expect(texts(one)).toEqual(['heard by all but us', 'after that'])
    expect(texts(two)).toEqual(texts(one))
  })

  it('when the page is loaded again before anything was sent', async () => {
    const store = new MemoryStore()
    const first = await client({ store, offline: true, principal: 'owner' })
    const one = await first.create({ title: 'kept' })
    await one.ask('from before')
    const before = first.list
    await first.close()
    const again = await client({ store, offline: true })
    expect(again.list).toEqual(before)
    expect(again.list).toMatchObject([{ id: one.id, title: 'kept', role: null }])
    // Nobody opens it: it is sent all the same.
    const other = await client()
    again.retry()
    const two = await other.open(one.id)
    await changes(two, () => texts(two).length === 2)
    expect(texts(two)[0]).toBe('from before')
    expect(two.meta.title).toBe('kept')
  })

  it('when the relay stops and starts', async () => {
    const here = await client()
    const one = await here.create()
    await one.send('before')
    await one.settled()
    await relay.stop()
    await until(
      () => here.status.state === 'offline',
      look => here.on('status', look)
    )
    await one.send('meanwhile')
    await relay.start()
    here.retry()
    await one.settled()
    const two = await (await client()).open(one.id)
    await two.synced()
    expect(texts(two)).toEqual(['before', 'meanwhile'])
  })

  it('when the relay loses its log', async () => {
    const here = await client()
    const one = await here.create()
    await one.send('before')
    await one.settled()
    await relay.stop()
    await one.send('meanwhile')
    await relay.start(true)
    here.retry()
    await one.settled()
    const two = await (await client()).open(one.id)
    await two.synced()
    expect(texts(two)).toEqual(['before', 'meanwhile'])
  })
})

describe('a refused write', () => {
  it('becomes a draft, and the rest goes on', async () => {
    const [here, there] = [await client(), await client({ token: 'ann' })]
    const one = await here.create()
    await one.share('ann', 'writer')
    await one.send('zero')
    await one.settled()
    const two = await there.open(one.id)
    await two.synced()
    expect(two.status.grant).toBe('writer')

    // While she is away she writes, and loses the right to.
    there.disconnect()
    await two.send('too late')
    await one.share('ann', 'reader')
    await one.settled()
    there.retry()
    await until(
      () => two.refused.length > 0,
      look => two.on('refused', look)
    )
    expect(two.refused).toMatchObject([{ text: 'too late', code: 'denied', kind: 'entry' }])
    expect(texts(two)).toEqual(['zero'])
    expect(two.status).toMatchObject({ state: 'synced', unsent: 0, grant: 'reader' })
    await expect(two.send('again')).rejects.toMatchObject({ code: 'refused' })

    const heard = changes(two, () => two.status.grant === 'writer')
    await one.share('ann', 'writer')
    await heard
    await two.resend(two.refused[0]?.id ?? '')
    await two.settled()
    expect(two.refused).toEqual([])
    await changes(one, () => texts(one).includes('too late'))
  })

  it('is not needed to leave', async () => {
    const [here, there] = [await client(), await client({ token: 'ann' })]
    const one = await here.create()
    await one.share('ann', 'writer')
    await one.settled()
    const two = await there.open(one.id)
    await two.synced()
    await two.leave()
    await until(
      () => two.status.state === 'refused',
      look => two.on('status', look)
    )
    expect(two.status).toMatchObject({ code: 4403, unsent: 0, grant: null })
    expect(two.refused).toEqual([])
    await changes(one, () => !one.access.has('ann'))
  })

  it('of a stranger closes the conversation and keeps it readable', async () => {
    const here = await client()
    const one = await here.create()
    await one.settled()
    const two = await (await client({ token: 'eve' })).open(one.id)
    await expect(two.synced()).rejects.toMatchObject({ code: 'refused', rule: '4403' })
    expect(two.status).toMatchObject({ state: 'refused', code: 4403 })
  })
})

it('refuses a relay with another key than the one it knows', async () => {
  const store = new MemoryStore()
  await store.saveProfile({ ...NO_PROFILE, relay: new Uint8Array(32) })
  const here = await client({ store })
  await until(
    () => here.status.state === 'refused',
    look => here.on('status', look)
  )
  expect(here.status.reason).toContain('another key')
})
