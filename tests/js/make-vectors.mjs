/*
 * Makes protocol/vectors/wire.json and protocol/vectors/yjs-updates.json: bytes as the real packages
 * write them (yjs, y-protocols, lib0), each with what it means, and bytes that every reader of the
 * protocol must refuse. Client ids and contents are fixed, so that making them twice gives equal
 * files; `npm test` holds the committed files against this program.
 *
 * Run with `npm run vectors` after a change here.
 */

import { writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import * as encoding from 'lib0/encoding'
import * as authProtocol from 'y-protocols/auth'
import * as awarenessProtocol from 'y-protocols/awareness'
import * as syncProtocol from 'y-protocols/sync'
import * as Y from 'yjs'

export const wireFile = new URL('../../protocol/vectors/wire.json', import.meta.url)
export const updatesFile = new URL('../../protocol/vectors/yjs-updates.json', import.meta.url)

export const hex = (bytes) => Buffer.from(bytes).toString('hex')
export const unhex = (text) => new Uint8Array(Buffer.from(text, 'hex'))

const written = (write) => encoding.encode(write)
const varUint = (number) => written((e) => encoding.writeVarUint(e, number))
const varString = (text) => written((e) => encoding.writeVarString(e, text))
const varBytes = (bytes) => written((e) => encoding.writeVarUint8Array(e, bytes))
const bytes = (...parts) =>
  Uint8Array.from(parts.flatMap((part) => (typeof part === 'number' ? [part] : [...part])))
const utf8 = (text) => new TextEncoder().encode(text)

// ---------------------------------------------------------------------------------------- wire

const messageSync = 0
const messageAwareness = 1
const messageAuth = 2
const messageQueryAwareness = 3

/** One frame as y-websocket writes it, from its meaning. */
export const frameOf = (message) =>
  written((encoder) => {
    switch (message.type) {
      case 'sync-step-1':
        encoding.writeVarUint(encoder, messageSync)
        encoding.writeVarUint(encoder, syncProtocol.messageYjsSyncStep1)
        encoding.writeVarUint8Array(encoder, unhex(message.state_vector))
        return
      case 'sync-step-2':
        encoding.writeVarUint(encoder, messageSync)
        encoding.writeVarUint(encoder, syncProtocol.messageYjsSyncStep2)
        encoding.writeVarUint8Array(encoder, unhex(message.update))
        return
      case 'sync-update':
        encoding.writeVarUint(encoder, messageSync)
        syncProtocol.writeUpdate(encoder, unhex(message.update))
        return
      case 'awareness': {
        const awareness = { states: new Map(), meta: new Map() }
        for (const { client, clock, state } of message.states) {
          awareness.meta.set(client, { clock })
          if (state !== null) awareness.states.set(client, state)
        }
        encoding.writeVarUint(encoder, messageAwareness)
        encoding.writeVarUint8Array(
          encoder,
          awarenessProtocol.encodeAwarenessUpdate(
            awareness,
            message.states.map(({ client }) => client)
          )
        )
        return
      }
      case 'auth-denied':
        encoding.writeVarUint(encoder, messageAuth)
        authProtocol.writePermissionDenied(encoder, message.reason)
        return
      case 'query-awareness':
        encoding.writeVarUint(encoder, messageQueryAwareness)
        return
      default:
        throw new Error(`no such message: ${message.type}`)
    }
  })

export const wireVectors = () => {
  const doc = new Y.Doc()
  doc.clientID = 2 ** 32 - 1
  doc.getText('t').insert(0, 'grüße 🎈')
  const other = new Y.Doc()
  other.clientID = 7
  other.getMap('m').set('k', 1)
  Y.applyUpdate(other, Y.encodeStateAsUpdate(doc))

  const step1 = (name, document) => ({
    name,
    message: {
      type: 'sync-step-1',
      state_vector: hex(Y.encodeStateVector(document)),
      clocks: Object.fromEntries(Y.decodeStateVector(Y.encodeStateVector(document)))
    }
  })
  const cases = [
    step1('step 1 of an empty document', new Y.Doc()),
    step1('step 1 of one client with the largest id', doc),
    step1('step 1 of two clients', other),
    {
      name: 'step 2 with nothing',
      message: { type: 'sync-step-2', update: hex(Y.encodeStateAsUpdate(new Y.Doc())) }
    },
    {
      name: 'step 2 with a document',
      message: { type: 'sync-step-2', update: hex(Y.encodeStateAsUpdate(other)) }
    },
    {
      name: 'step 2 longer than one length byte',
      message: {
        type: 'sync-step-2',
        update: (() => {
          const long = new Y.Doc()
          long.clientID = 300
          long.getText('t').insert(0, 'a'.repeat(300))
          return hex(Y.encodeStateAsUpdate(long))
        })()
      }
    },
    {
      name: 'update',
      message: { type: 'sync-update', update: hex(Y.encodeStateAsUpdate(doc)) }
    },
    {
      name: 'awareness of two clients, one of them gone',
      message: {
        type: 'awareness',
        states: [
          { client: 7, clock: 1, state: { user: { name: 'Zoë 🎈', color: '#30bced' } } },
          { client: 2 ** 32 - 1, clock: 300, state: null }
        ]
      }
    },
    { name: 'awareness of nobody', message: { type: 'awareness', states: [] } },
    {
      name: 'awareness with a fresh state',
      message: { type: 'awareness', states: [{ client: 1, clock: 0, state: {} }] }
    },
    {
      name: 'auth refused',
      message: { type: 'auth-denied', reason: 'no access to “this” conversation' }
    },
    { name: 'query awareness', message: { type: 'query-awareness' } }
  ]

  const state = (json) => bytes(1, varBytes(bytes(1, 7, 1, varString(json))))
  const refused = [
    ['nothing', bytes()],
    ['unknown message type', bytes(4)],
    ['unknown sync type', bytes(0, 3, 0)],
    ['unknown auth type', bytes(2, 1, varString('x'))],
    ['only a message type', bytes(0)],
    ['two messages in one frame', bytes(0, 0, 1, 0, 0, 0, 1, 0)],
    ['a byte after query awareness', bytes(3, 0)],
    ['a length beyond the end', bytes(0, 2, 3, 0, 0)],
    ['a number that does not end', bytes(0, 2, 0x80)],
    ['a number longer than needed', bytes(0, 2, 0x82, 0x00, 0, 0)],
    ['a number over 2^53 - 1', bytes(0, 2, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10)],
    ['a number of nine bytes', bytes(0, 2, 0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01)],
    ['a state vector that ends early', bytes(0, 0, varBytes(bytes(1, 7)))],
    ['a state vector with bytes left over', bytes(0, 0, varBytes(bytes(0, 0)))],
    ['a state vector with a client twice', bytes(0, 0, varBytes(bytes(2, 7, 1, 7, 2)))],
    ['a client id of 33 bits', bytes(0, 0, varBytes(bytes(1, varUint(2 ** 32), 1)))],
    ['a clock of 33 bits', bytes(0, 0, varBytes(bytes(1, 7, varUint(2 ** 32))))],
    ['an auth reason that is no UTF-8', bytes(2, 0, 2, 0xc3, 0x28)],
    ['an auth reason with a lone surrogate', bytes(2, 0, 3, 0xed, 0xa0, 0x80)],
    ['awareness that ends early', bytes(1, varBytes(bytes(2, 7, 1, varString('{}'))))],
    ['awareness with bytes left over', bytes(1, varBytes(bytes(0, 0)))],
    ['awareness that is no JSON', state("{'a':1}")],
    ['awareness with an empty state', state('')],
    ['awareness with NaN', state('{"x":NaN}')],
    ['awareness with a lone surrogate', state('"\\ud800"')],
    ['awareness nested 17 deep', state('['.repeat(17) + ']'.repeat(17))],
    ['awareness of 1,025 states', bytes(1, varBytes(varUint(1025)))]
  ]
  return {
    about:
      'Frames of the plain y-websocket dialect. `cases` were made by y-protocols and mean `message`; every frame in `refused` is malformed.',
    cases: cases.map(({ name, message }) => ({ name, frame: hex(frameOf(message)), message })),
    refused: refused.map(([name, frame]) => ({ name, frame: hex(frame) }))
  }
}

// ------------------------------------------------------------------------------------- updates

/** A plain value as JSON; what JSON lacks is an object with the key `$`. */
const plain = (value) => {
  if (value === undefined) return { $: 'undefined' }
  if (typeof value === 'bigint') return { $: 'bigint', value: `${value}` }
  if (value instanceof Y.Doc) return { $: 'doc', value: value.guid }
  if (value instanceof Uint8Array) return { $: 'bytes', value: hex(value) }
  if (typeof value === 'number' && !Number.isFinite(value)) return { $: 'number', value: `${value}` }
  if (Array.isArray(value)) return value.map(plain)
  if (value !== null && typeof value === 'object') {
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, plain(each)]))
  }
  return value
}

const typeNames = [
  [Y.XmlHook, 'xml-hook'],
  [Y.XmlText, 'xml-text'],
  [Y.XmlElement, 'xml-element'],
  [Y.XmlFragment, 'xml-fragment'],
  [Y.Array, 'array'],
  [Y.Map, 'map'],
  [Y.Text, 'text']
]

const contentOf = (content) => {
  switch (content.constructor) {
    case Y.ContentDeleted:
      return { kind: 'deleted' }
    case Y.ContentJSON:
      return { kind: 'json', content: content.arr.map(plain) }
    case Y.ContentBinary:
      return { kind: 'binary', content: hex(content.content) }
    case Y.ContentString:
      return { kind: 'string', content: content.str }
    case Y.ContentEmbed:
      return { kind: 'embed', content: [plain(content.embed)] }
    case Y.ContentFormat:
      return { kind: 'format', content: { key: content.key, value: plain(content.value) } }
    case Y.ContentAny:
      return { kind: 'any', content: content.arr.map(plain) }
    case Y.ContentDoc:
      return { kind: 'doc', content: { guid: content.doc.guid, options: plain(content.opts) } }
    case Y.ContentType: {
      const [, type] = typeNames.find(([constructor]) => content.type instanceof constructor)
      const name = content.type.nodeName ?? content.type.hookName ?? null
      return { kind: 'type', content: { type, name } }
    }
    default:
      throw new Error('unknown content')
  }
}

const idOf = (id) => (id === null ? null : [id.client, id.clock])

/** What Yjs itself reads in an update, as plain data. */
export const meaningOf = (update) => {
  const { structs, ds } = Y.decodeUpdate(update)
  return {
    structs: structs.map((struct) => {
      const range = { client: struct.id.client, clock: struct.id.clock, length: struct.length }
      if (struct instanceof Y.Skip) return { ...range, kind: 'skip' }
      if (struct instanceof Y.GC) return { ...range, kind: 'gc' }
      return {
        ...range,
        origin: idOf(struct.origin),
        right_origin: idOf(struct.rightOrigin),
        parent: struct.parent instanceof Y.ID ? idOf(struct.parent) : struct.parent,
        parent_sub: struct.parentSub,
        ...contentOf(struct.content)
      }
    }),
    deleted: [...ds.clients.entries()].flatMap(([client, items]) =>
      items.map(({ clock, len }) => ({ client, clock, length: len }))
    )
  }
}

/** A document that knows `updates`, with the roots that these vectors use. */
export const documentOf = (updates) => {
  const doc = new Y.Doc()
  doc.clientID = 99
  doc.getMap('m')
  doc.getText('t')
  doc.getArray('a')
  for (const update of updates) Y.applyUpdate(doc, update)
  return doc
}

export const viewOf = (doc) => ({
  m: plain(doc.getMap('m').toJSON()),
  t: doc.getText('t').toString(),
  a: plain(doc.getArray('a').toJSON())
})

export const clocksOf = (doc) =>
  Object.fromEntries(Y.decodeStateVector(Y.encodeStateVector(doc)))

export const updateVectors = () => {
  const cases = []

  /** A fresh replica that keeps the updates it makes. */
  const replica = (client, ...known) => {
    const doc = documentOf(known)
    doc.clientID = client
    const made = []
    doc.on('update', (update, origin) => {
      if (origin !== 'remote') made.push(update)
    })
    return { doc, made, m: doc.getMap('m'), t: doc.getText('t'), a: doc.getArray('a') }
  }

  /** `requires`: what must be known before; `gap`: what is lacking if only `requires` is known. */
  const add = (name, update, requires = [], gap = null) => {
    const doc = documentOf([...requires, update])
    cases.push({
      name,
      update: hex(update),
      requires: requires.map(hex),
      gap,
      ...meaningOf(update),
      clocks: clocksOf(doc),
      view: gap === null ? viewOf(doc) : null
    })
  }

  add('nothing', Y.encodeStateAsUpdate(new Y.Doc()))

  {
    const { doc, m, made } = replica(1)
    m.set('title', 'Grüße')
    add('a key set in a map', made[0])
    m.set('title', 'Hello')
    add('a key set again: the old value is deleted', made[1], [made[0]])
    m.delete('title')
    add('a key deleted: a delete set alone', made[2], made.slice(0, 2))
    add('a delete set for clocks that are not known', made[2], [], 'deleted')
    add('a key set again without the first value', made[1], [], 'earlier')
    add('the document after its key was deleted', Y.encodeStateAsUpdate(doc))
  }

  {
    const { m, made } = replica(2 ** 32 - 1)
    m.set(
      'values',
      [
        undefined, null, true, false, '', 'text', '🎈', 0, 1, -1, 63, 64, -64, 8191, 8192,
        2 ** 31 - 1, -(2 ** 31) + 1, 2 ** 31, 2 ** 53 - 1, -(2 ** 53) + 1, 0.5, 0.1, -1e300, NaN,
        Infinity, -Infinity, 10n, -(2n ** 63n), new Uint8Array([0, 255]), new Uint8Array(0),
        [], {}, [[1, [2]], { a: { b: [null] } }], { 'ключ': 'значение', '': 0 }
      ]
    )
    add('a plain value of every kind', made[0])
    m.set('bytes', new Uint8Array([1, 2, 3]))
    add('bytes as a value', made[1], [made[0]])
    let nested = 1
    for (let depth = 0; depth < 16; depth++) nested = depth % 2 ? { x: nested } : [nested]
    m.set('nested', nested)
    add('a value nested 16 deep', made[2], made.slice(0, 2))
  }

  {
    const { doc, m, made } = replica(3)
    doc.transact(() => {
      const entry = new Y.Map()
      m.set('entry', entry)
      entry.set('born', { role: 'assistant', clock: 1 })
      entry.set('content', new Y.Text('He'))
      entry.set('sealed', new Y.Array())
    })
    add('a map with a text and an array in it', made[0])
    m.get('entry').get('content').insert(2, 'llo 🎈')
    add('an insert at the end of a nested text', made[1], [made[0]])
    m.get('entry').get('sealed').push([new Uint8Array(40).fill(7)])
    add('bytes appended to a nested array', made[2], made.slice(0, 2))
    add('an insert into a text that is not known', made[1], [], 'earlier')
    const second = replica(4, made[0])
    second.m.get('entry').set('stop', 'owner')
    add('a key in another client’s map', second.made[0], [made[0]])
    add('a key in a map that is not known', second.made[0], [], 'parent')
    m.delete('entry')
    add('the document after its nested map was deleted and collected', Y.encodeStateAsUpdate(doc))
  }

  {
    const one = replica(11)
    one.t.insert(0, 'ab')
    const start = one.made[0]
    const two = replica(12, start)
    const three = replica(13, start)
    two.t.insert(1, '🎈')
    three.t.insert(1, 'é')
    three.t.insert(0, '^')
    add('an insert between two characters of another client', two.made[0], [start])
    add('the same without them', two.made[0], [], 'origin')
    add('an insert at the front of another client’s text', three.made[1], [start, three.made[0]])
    add('an insert at the front without the one before it', three.made[1], [start], 'earlier')
    const front = replica(14, start)
    front.t.insert(0, '>')
    add('an insert before a character that is not known', front.made[0], [], 'right_origin')
    add('concurrent inserts, merged', Y.mergeUpdates([start, two.made[0], ...three.made]))
    const both = documentOf([start, two.made[0], ...three.made])
    add('concurrent inserts, as one document', Y.encodeStateAsUpdate(both))
    add(
      'concurrent inserts, for a replica that has the first',
      Y.encodeStateAsUpdate(both, Y.encodeStateVector(one.doc)),
      [start]
    )
  }

  {
    const { doc, t, made } = replica(21)
    t.insert(0, 'a🎈b')
    t.delete(1, 1)
    add('half of a surrogate pair deleted', made[1], [made[0]])
    add('the document after half of a pair was deleted', Y.encodeStateAsUpdate(doc))
  }

  {
    const { doc, t, a, made } = replica(31)
    t.insert(0, 'one')
    a.push([1, 'two', null])
    t.insert(3, ' more')
    a.delete(0, 2)
    add('a part of an array deleted', made[3], made.slice(0, 3))
    add('the second of three left out: skipped', Y.mergeUpdates([made[0], made[2]]), [], 'skipped')
    add(
      'the same where the skipped clocks are known',
      Y.mergeUpdates([made[0], made[2]]),
      made.slice(0, 2)
    )
    add('all four merged', Y.mergeUpdates(made))
    add('the last alone', made[2], [made[0]], 'earlier')
    add('an update that is known already', made[0], made)
    add('the document after the array', Y.encodeStateAsUpdate(doc))
  }

  {
    const { doc, t, made } = replica(41)
    const undo = new Y.UndoManager(t, { captureTimeout: 0 })
    t.insert(0, 'keep')
    undo.stopCapturing()
    t.insert(4, ' drop')
    undo.undo()
    add('an insert undone', made[2], made.slice(0, 2))
    undo.redo()
    add('an undo redone', made[3], made.slice(0, 3))
    add('the document after undo and redo', Y.encodeStateAsUpdate(doc))
  }

  {
    const { doc, t, made } = replica(51)
    t.insert(0, 'bold', { bold: true })
    t.insertEmbed(4, { image: 'x.png' })
    add('rich text: formats and an embed', Y.mergeUpdates(made))
    const fragment = doc.getXmlFragment('x')
    const before = made.length
    doc.transact(() => {
      const element = new Y.XmlElement('p')
      fragment.insert(0, [element, new Y.XmlText('in'), new Y.XmlHook('hook')])
      element.setAttribute('class', 'c')
    })
    add('XML types', made[before], made.slice(0, before))
    doc.getMap('m').set('sub', new Y.Doc({ guid: 'fixed-guid', meta: { a: 1 } }))
    add('a subdocument', made[before + 1], made.slice(0, before + 1))
  }

  // Yjs 13 still reads this older form of plain values, but no longer writes it by itself.
  add(
    'values in the old JSON form',
    bytes(1, 1, 61, 0, 2, 1, varString('a'), 3, varString('{"k":[1,2]}'), varString('undefined'), varString('"🎈"'), 0)
  )

  const any = (...parts) => bytes(1, 1, 7, 0, 8, 1, varString('a'), 1, ...parts, 0)
  const text = (info, ...parts) => bytes(1, 1, 7, 0, info, ...parts, 0)
  const root = bytes(1, varString('t'))
  const refused = [
    ['nothing', bytes()],
    ['no delete set', bytes(0)],
    ['a byte after the update', bytes(0, 0, 0)],
    ['more sections than there are', bytes(1)],
    ['two sections of one client', bytes(2, 1, 7, 0, 0, 1, 1, 7, 1, 0, 1, 0)],
    ['a section without structs', bytes(1, 0, 7, 0, 0)],
    ['a client id of 33 bits', bytes(1, 1, varUint(2 ** 32), 0, 0, 1, 0)],
    ['a clock of 33 bits', bytes(1, 1, 7, varUint(2 ** 32 - 1), 0, 1, 0)],
    ['a length of 53 bits', bytes(1, 1, 7, 0, 0, varUint(2 ** 53 - 1), 0)],
    ['a collected struct with flags', bytes(1, 1, 7, 0, 0x80, 1, 0)],
    ['a collected struct without length', bytes(1, 1, 7, 0, 0, 0, 0)],
    ['a skipped struct without length', bytes(1, 1, 7, 0, 10, 0, 0)],
    ['an unknown content kind', text(11, root, 1)],
    ['an unknown shared type', text(7, root, 7)],
    ['an unknown parent form', text(4, 2, varString('t'), varString('x'))],
    ['an empty text', text(4, root, 0)],
    ['text that is no UTF-8', text(4, root, 2, 0xc3, 0x28)],
    ['text with a lone surrogate', text(4, root, 3, 0xed, 0xa0, 0x80)],
    ['text beyond the end', text(4, root, 9, utf8('x'))],
    ['an origin that is the struct itself', text(0x84, 7, 0, varString('x'))],
    ['a parent that is a later struct', text(4, 0, 7, 1, varString('x'))],
    ['an origin with a clock of 33 bits', text(0x84, 8, varUint(2 ** 32), varString('x'))],
    ['an embed that is no JSON', text(5, root, varString('{'))],
    ['an unknown value type', any(115)],
    ['no values', bytes(1, 1, 7, 0, 8, root, 0, 0)],
    ['an object with a key twice', any(118, 2, varString('k'), 126, varString('k'), 126)],
    ['a value nested 17 deep', any(...Array(17).fill([117, 1]).flat(), 126)],
    ['a float64 that ends early', bytes(1, 1, 7, 0, 8, root, 1, 123, 0, 0)],
    ['an integer over 2^53 - 1', any(125, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20)],
    ['an integer longer than needed', any(125, 0x81, 0x00)],
    ['an array with more elements than bytes', any(117, varUint(2 ** 40))],
    ['a delete set that names a client twice', bytes(0, 2, 7, 1, 0, 1, 7, 1, 3, 1)],
    ['a delete set with an empty range', bytes(0, 1, 7, 1, 0, 0)],
    ['a delete set with a client without ranges', bytes(0, 1, 7, 0)],
    ['a delete set over 32 bits', bytes(0, 1, 7, 1, 1, varUint(2 ** 32 - 1))]
  ]
  return {
    about:
      'Yjs v1 updates made by real Yjs, and what Yjs reads in them. `clocks` and `view` are those of a document that applied `requires` and then `update`; `gap` names what an update lacks when only `requires` is known. Every update in `refused` must be refused before it is applied.',
    cases,
    refused: refused.map(([name, update]) => ({ name, update: hex(update) }))
  }
}

export const printed = (vectors) => `${JSON.stringify(vectors, null, 1)}\n`

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  writeFileSync(wireFile, printed(wireVectors()))
  writeFileSync(updatesFile, printed(updateVectors()))
}
