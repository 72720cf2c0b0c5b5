// A stock Yjs client under a tiny line protocol: one JSON request a line on stdin, one JSON answer a
// line on stdout. It knows the document's schema and y-websocket, nothing of the relay.

import { createHash, randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import WebSocket from 'ws'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'

console.warn = () => {} // y-websocket prints refusals there

const doc = new Y.Doc()
const entries = doc.getMap('entries')
const meta = doc.getMap('meta')
const refusals = [] // { code, reason } of every close that the provider took as final
const closes = [] // the codes of all closes
let connections = 0
let provider = null
let owner = null

const conversationId = (name, nonce) =>
  createHash('sha256').update(name).update(nonce).digest('base64url').slice(0, 22)

const CROCKFORD = '0123456789ABCDEFGHJKMNPQRSTVWXYZ'
const ulid = () => {
  let number = (BigInt(Date.now()) << 80n) | BigInt('0x' + randomBytes(10).toString('hex'))
  let text = ''
  for (let i = 0; i < 26; i++, number >>= 5n) text = CROCKFORD[Number(number & 31n)] + text
  return text
}

const line = () =>
  [...entries.entries()]
    .map(([id, entry]) => ({ id, born: entry.get('born'), text: String(entry.get('content')) }))
    .sort((a, b) => a.born.clock - b.born.clock || (a.id < b.id ? -1 : 1))

const say = (text, role) => {
  const known = line()
  const last = known.at(-1)
  const born = { role, author: owner, device: 'browser', at: Date.now(), clock: (last?.born.clock ?? 0) + 1, mode: 'continue' }
  if (last) born.after = last.id
  doc.transact(() => {
    const entry = new Y.Map()
    entry.set('born', born)
    entry.set('content', text)
    entries.set(ulid(), entry)
  })
}

// An entry and the slot behind it, in one transaction, as SCHEMA.md has them.
const ask = (text, params) => {
  const known = line()
  const slot = ulid()
  doc.transact(() => {
    say(text, 'user')
    const user = line().at(-1)
    const entry = new Y.Map()
    entry.set('born', {
      role: 'assistant', author: owner, device: 'browser', at: Date.now(),
      clock: (known.at(-1)?.born.clock ?? 0) + 2, mode: 'continue', after: user.id, params
    })
    entries.set(slot, entry)
  })
  return slot
}

// Resolves once `holds` does; looks again after every change of the document or the connection.
let waiting = []
const look = () => { waiting = waiting.filter(({ holds, done }) => !holds() || done()) }
const until = holds => holds()
  ? Promise.resolve()
  : new Promise(resolve => waiting.push({ holds, done: () => { resolve(); return false } }))
doc.on('update', look)

const requests = {
  birth: ({ principal }) => {
    owner = principal
    const nonce = randomBytes(16)
    doc.transact(() => {
      meta.set('schema', 1)
      meta.set('birth', { owner, nonce: new Uint8Array(nonce) })
    })
    return conversationId(owner, nonce)
  },
  connect: ({ url, conversation, token, principal, greeting }) => {
    owner = principal
    provider = new WebsocketProvider(url, conversation, doc, {
      params: { token }, WebSocketPolyfill: WebSocket, disableBc: true
    })
    provider.on('status', ({ status }) => {
      connections += status === 'connected'
      // Written here, an update goes out before the client's own Step1.
      if (greeting && status === 'connected' && connections === 1) say(greeting, 'user')
      look()
    })
    provider.on('sync', look)
    provider.on('closed', close => { refusals.push(close); look() })
    provider.on('connection-close', event => { if (event) closes.push(event.code); look() })
    provider.awareness.on('update', look)
  },
  synced: () => until(() => provider.synced),
  unsynced: () => until(() => !provider.synced),
  say: ({ text, role }) => say(text, role ?? 'user'),
  ask: ({ text, params }) => ask(text, params),
  // Waits for the end of a reply; `steps` are the lengths of its text as it grew.
  reply: async ({ slot }) => {
    const steps = []
    await until(() => {
      const entry = entries.get(slot)
      const length = entry?.get('content')?.length ?? 0
      if (length && length !== steps.at(-1)) steps.push(length)
      return ['done', 'stopped', 'failed'].includes(entry?.get('state'))
    })
    const entry = entries.get(slot)
    return { steps, text: String(entry.get('content')), state: entry.get('state'), usage: entry.get('usage') }
  },
  forge: () => meta.set('no-such-key', 'forged'),
  texts: async ({ count }) => {
    await until(() => entries.size >= count)
    return line().map(entry => entry.text)
  },
  refused: async () => {
    await until(() => refusals.length > 0)
    return { ...refusals[0], comesBack: provider.shouldConnect, connections }
  },
  closed: async () => {
    await until(() => closes.length > 0)
    return closes
  },
  present: async ({ name }) => {
    const names = () => [...provider.awareness.getStates().values()].map(state => state.name)
    await until(() => names().includes(name))
    return names().filter(Boolean).sort()
  },
  absent: ({ name }) =>
    until(() => ![...provider.awareness.getStates().values()].some(state => state.name === name)),
  introduce: ({ name }) => provider.awareness.setLocalStateField('name', name),
  state: () => ({
    vector: Buffer.from(Y.encodeStateVector(doc)).toString('hex'),
    texts: line().map(entry => entry.text),
    content: { meta: meta.toJSON(), entries: entries.toJSON() }
  }),
  disconnect: () => provider.disconnect(),
  reconnect: () => provider.connect()
}

for await (const request of createInterface({ input: process.stdin })) {
  const { do: name, ...given } = JSON.parse(request)
  try {
    console.log(JSON.stringify({ answer: (await requests[name](given)) ?? null }))
  } catch (error) {
    console.log(JSON.stringify({ error: String(error) }))
  }
}
process.exit(0)
