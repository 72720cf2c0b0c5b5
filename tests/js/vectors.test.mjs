/*
 * Real Yjs holds the committed vectors: it makes them again byte for byte, and reads them as they say.
 */

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import * as decoding from 'lib0/decoding'
import * as encoding from 'lib0/encoding'
import * as authProtocol from 'y-protocols/auth'
import * as awarenessProtocol from 'y-protocols/awareness'
import * as syncProtocol from 'y-protocols/sync'
import * as Y from 'yjs'
import {
  clocksOf,
  documentOf,
  frameOf,
  hex,
  meaningOf,
  printed,
  unhex,
  updatesFile,
  updateVectors,
  viewOf,
  wireFile,
  wireVectors
} from './make-vectors.mjs'

const wire = JSON.parse(readFileSync(wireFile, 'utf8'))
const updates = JSON.parse(readFileSync(updatesFile, 'utf8'))

test('the committed vectors are what the packages make today', () => {
  assert.equal(readFileSync(wireFile, 'utf8'), printed(wireVectors()))
  assert.equal(readFileSync(updatesFile, 'utf8'), printed(updateVectors()))
})

/** Reads a frame with the packages' own readers, as y-websocket does. */
const read = (frame) => {
  const decoder = decoding.createDecoder(frame)
  const type = decoding.readVarUint(decoder)
  let message
  if (type === 0) {
    // The reader that acts on a sync message consumes it; a copy is read for its payload.
    const payload = decoding.createDecoder(frame)
    decoding.readVarUint(payload)
    decoding.readVarUint(payload)
    const body = hex(decoding.readVarUint8Array(payload))
    const step = syncProtocol.readSyncMessage(
      decoder,
      encoding.createEncoder(),
      new Y.Doc(),
      'test',
      (error) => {
        throw error
      }
    )
    message = [
      { type: 'sync-step-1', state_vector: body },
      { type: 'sync-step-2', update: body },
      { type: 'sync-update', update: body }
    ][step]
    if (step === 0) message.clocks = Object.fromEntries(Y.decodeStateVector(unhex(body)))
  } else if (type === 1) {
    const states = []
    awarenessProtocol.modifyAwarenessUpdate(
      decoding.readVarUint8Array(decoder),
      (state) => states.push(state) && state
    )
    message = { type: 'awareness', states }
  } else if (type === 2) {
    authProtocol.readAuthMessage(decoder, null, (_doc, reason) => {
      message = { type: 'auth-denied', reason }
    })
  } else {
    message = { type: 'query-awareness' }
  }
  assert.equal(decoding.hasContent(decoder), false, 'bytes are left over')
  return message
}

for (const { name, frame, message } of wire.cases) {
  test(`wire: ${name}`, () => {
    assert.equal(hex(frameOf(message)), frame)
    const expected =
      message.type === 'awareness'
        ? { ...message, states: message.states.map(({ state }) => state) }
        : message
    assert.deepEqual(read(unhex(frame)), expected)
  })
}

for (const { name, update, requires, gap, structs, deleted, clocks, view } of updates.cases) {
  test(`update: ${name}`, () => {
    assert.deepEqual(meaningOf(unhex(update)), { structs, deleted })
    const doc = documentOf([...requires, update].map(unhex))
    const pending = doc.store.pendingStructs !== null || doc.store.pendingDs !== null
    assert.equal(pending, gap !== null, 'Yjs holds back exactly the updates with a gap')
    assert.deepEqual(clocksOf(doc), clocks)
    if (gap === null) assert.deepEqual(viewOf(doc), view)
  })
}
