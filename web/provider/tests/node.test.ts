/** A provider on `crdt-llm serve` with a node: tiny random weights, and everything else real. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterAll, beforeAll, expect, it } from 'vitest'
import {
  type Client,
  type Conversation,
  type Listed,
  MemoryStore,
  openClient
} from '../src/index.js'
import { PYTHON, path, realSocket, until } from './relay.js'

const data = mkdtempSync(join(tmpdir(), 'crdt-llm-provider-'))
const clients: Client[] = []
let server: ChildProcess | null = null
let url = ''
// However this process ends, the server ends with it.
process.on('exit', () => server?.kill('SIGKILL'))

beforeAll(async () => {
  const model = join(data, 'tiny')
  const make =
    'import sys; from pathlib import Path; from tiny_model import build_tiny_model; build_tiny_model(Path(sys.argv[1]))'
  const made = spawnSync(PYTHON, ['-c', make, model], {
    env: { ...process.env, PYTHONPATH: path('../../../tests'), OMP_NUM_THREADS: '1' },
    encoding: 'utf8'
  })
  expect(made.stderr).toBe('')
  server = spawn(
    PYTHON,
    ['-m', 'crdt_llm', 'serve', '--port', '0', '--data', join(data, 'data'), '--model', model],
    {
      cwd: path('../../..'),
      env: { ...process.env, OMP_NUM_THREADS: '1' },
      stdio: ['ignore', 'pipe', 'inherit']
    }
  )
  for await (const line of createInterface({ input: server.stdout as NodeJS.ReadableStream })) {
    if (!line.startsWith('ready ')) continue
    url = line.split(' ')[1] ?? ''
    break
  }
  expect(url).not.toBe('')
  server.stdout?.resume() // what else it says must not fill the pipe
})

afterAll(async () => {
  await Promise.allSettled(clients.map(client => client.close()))
  if (server !== null && server.exitCode === null && server.signalCode === null) {
    const ended = once(server, 'exit')
    server.kill('SIGTERM')
    await ended
  }
  rmSync(data, { recursive: true, force: true })
})

const ownerToken = (): string => readFileSync(join(data, 'data', 'owner.token'), 'utf8').trim()

const client = async (token = ownerToken()): Promise<Client> => {
  const opened = await openClient({ url, token, store: new MemoryStore(), socket: realSocket })
  clients.push(opened)
  return opened
}

const standing = (one: Conversation, id: string, ...wanted: string[]): Promise<void> =>
  until(
    () => wanted.includes(one.entry(id)?.standing ?? ''),
    look => one.on('change', look)
  )

it('gets a reply word by word, with a chain that holds', async () => {
  const one = await (await client()).create({ title: 'A story' })
  const grown = new Set<string>()
  one.on('change', ({ entries }) => {
    for (const id of entries) {
      const entry = one.entry(id)
      if (entry?.isSlot) grown.add(entry.content)
    }
  })
  one.typing('Tell me')
  const { entry, slot } = await one.ask('Tell me a story', {
    params: { max_tokens: 40, ignore_eos: true }
  })
  await standing(one, slot, 'settled', 'failed')
  expect(one.entry(slot)).toMatchObject({ standing: 'settled', state: 'done' })
  expect(one.entry(slot)?.usage).toMatchObject({ sampled: 40, finish: 'length' })
  expect(grown.size).toBeGreaterThan(2)
  expect([...grown].every(text => (one.entry(slot)?.content ?? '').startsWith(text))).toBe(true)
  expect(await one.verify()).toMatchObject([
    { entry, problem: null },
    { entry: slot, problem: null }
  ])
  expect(one.sealed(slot)).toHaveLength(1)

  const on = await one.continue(slot, { max_tokens: 5 })
  await standing(one, on, 'settled', 'failed')
  expect(one.view()).toEqual([entry, slot, on])

  // Another device reads the same, and the chain holds there too.
  const two = await (await client()).open(one.id)
  await two.synced()
  expect(two.entries()).toEqual(one.entries())
  expect((await two.verify()).map(({ problem }) => problem)).toEqual([null, null, null])
})

it('stops a reply, and asks again', async () => {
  const one = await (await client()).create()
  const { slot } = await one.ask('Go on for ever', {
    params: { max_tokens: 2_000, ignore_eos: true }
  })
  await standing(one, slot, 'streaming')
  await one.stop(slot)
  await standing(one, slot, 'stopped', 'settled')
  expect(one.entry(slot)).toMatchObject({ standing: 'stopped', stop: 'owner' })
  const again = await one.regenerate(slot, { max_tokens: 3 })
  await standing(one, again, 'settled', 'failed')
  expect(one.siblings(again)).toEqual([slot, again])
  expect((await one.verify()).map(({ problem }) => problem)).toEqual([null, null])
  expect(one.refused).toEqual([])
})

it('lists, archives, and lets a guest in and out', async () => {
  const [here, there] = [await client(), await client()]
  const listed = (one: Client, holds: (line: Listed | undefined) => boolean): Promise<void> =>
    until(
      () => holds(one.list.find(({ id }) => id === conversation.id)),
      look => one.on('list', look)
    )
  const conversation = await here.create({ title: 'Between us' })
  await conversation.send('hello')
  await listed(there, line => line?.title === 'Between us' && line.role === 'owner')
  await conversation.rename('Among us')
  await listed(there, line => line?.title === 'Among us')
  await here.archive(conversation.id, true)
  await listed(there, line => line?.archived === true)

  const invitation = await here.invite(conversation.id, { role: 'writer', name: 'Ann' })
  const guest = await client(invitation.token)
  const two = await guest.open(invitation.conversation)
  await two.synced()
  expect(two.status.grant).toBe('writer')
  await two.send('thank you')
  await two.settled()
  expect(two.entries().map(({ content }) => content)).toEqual(['hello', 'thank you'])
  expect(guest.status.principal).toBe(invitation.principal)

  await here.revoke(invitation.id)
  await until(
    () => guest.status.state === 'refused',
    look => guest.on('status', look)
  )
  expect(guest.status.code).toBe(4401)
})
