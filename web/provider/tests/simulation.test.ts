/**
 * Replicas and a relay under random lines, refusals and reloads. A failing seed replays.
 *
 * The relay here is the native dialect's contract in a few lines: it takes an update whole or not at
 * all, asks for what an update builds on, refuses some texts for good and some updates for now, and
 * loses its log now and then.
 */

import { describe, expect, it } from 'vitest'
import { clocksOf, Document } from '../src/document.js'
import type { FromClient, FromRelay } from '../src/frames.js'
import { type Port, Replica } from '../src/replica.js'
import { entryId, ROOT } from '../src/schema.js'
import { covers, decodeStateVector, encodeStateVector } from '../src/state-vector.js'
import { MemoryStore } from '../src/store.js'
import { FakeTime } from './fakes.js'

const ID = 'A'.repeat(22)
const SEEDS = 60
const STEPS = 120

/** Draws whole numbers below a bound. */
type Draw = (bound: number) => number

class Relay {
  document = new Document(1)
  log = 'log 0'
  lsn = 0
  readonly devices: Device[] = []
  logs = 0

  constructor(private readonly draw: Draw) {}

  loseLog(): void {
    for (const device of this.devices) device.cut()
    this.document.destroy()
    this.document = new Document(1)
    this.log = `log ${++this.logs}`
    this.lsn = 0
  }

  /** What came from a device; the answers go on its line. */
  hear(device: Device, frame: FromClient, patient: boolean): void {
    switch (frame.kind) {
      case 'open': {
        const resumes = frame.log === this.log && frame.lsn === this.lsn
        device.line.push({
          kind: 'opened',
          channel: 1,
          log: this.log,
          lsn: this.lsn,
          update: resumes ? Uint8Array.of(0, 0) : this.document.diff(frame.stateVector),
          stateVector: encodeStateVector(this.document.stateVector()),
          grant: 'writer',
          behind: false
        })
        device.isIn = true
        return
      }
      case 'pull':
        device.line.push({
          kind: 'state',
          channel: 1,
          lsn: this.lsn,
          update: this.document.diff(frame.stateVector)
        })
        return
      case 'update':
      case 'restore':
        return this.judge(device, frame, patient)
      default: // presence, and leaving
    }
  }

  private judge(
    device: Device,
    { id, update, kind }: FromClient & { kind: 'update' | 'restore' },
    patient: boolean
  ): void {
    const nack = (code: 'gap' | 'denied' | 'unavailable'): void => {
      device.line.push({
        kind: 'nack',
        channel: 1,
        id,
        code,
        rule: '',
        reason: code,
        retryMs: code === 'unavailable' ? 10 : null,
        stateVector: code === 'gap' ? encodeStateVector(this.document.stateVector()) : null
      })
    }
    const { from, to } = clocksOf(update)
    const here = this.document.stateVector()
    if (covers(here, to)) {
      device.line.push({ kind: 'ack', channel: 1, id, lsn: this.lsn })
      return
    }
    if (!patient && kind === 'update' && this.draw(12) === 0) return nack('unavailable')
    for (const [client, clock] of from) if ((here.get(client) ?? 0) < clock) return nack('gap')
    const trial = new Document(2)
    trial.applyAll([this.document.diff(), update])
    const news = [...trial.tree.entries].filter(entry => !this.document.tree.has(entry))
    const after = (entry: string): string => trial.born(entry)?.after ?? ROOT
    if (trial.lacks || news.some(entry => after(entry) !== ROOT && !trial.tree.has(after(entry)))) {
      return nack('gap')
    }
    if (news.some(entry => trial.entry(entry, false)?.content.startsWith('bad'))) {
      return nack('denied')
    }
    trial.destroy()
    this.document.apply(update)
    this.lsn++
    for (const other of this.devices) {
      if (other !== device && other.isIn) {
        other.line.push({ kind: 'change', channel: 1, lsn: this.lsn, update })
      }
    }
    device.line.push({ kind: 'ack', channel: 1, id, lsn: this.lsn })
  }
}

class Device {
  readonly store = new MemoryStore()
  readonly time: FakeTime
  /** What the relay said and the device has not heard yet; and the other way round. */
  line: FromRelay[] = []
  sent: FromClient[] = []
  isIn = false
  connected = false
  replica!: Replica
  readonly wrote: string[] = []

  constructor(
    readonly name: string,
    seed: number,
    private readonly relay: Relay
  ) {
    this.time = new FakeTime(seed)
  }

  async load(): Promise<void> {
    this.cut()
    const port: Port = {
      send: frame => this.sent.push(frame),
      keep: steps => void this.store.write(ID, steps),
      compact: () => undefined,
      wrote: () => undefined,
      settled: () => undefined,
      resumeIn: ms => {
        const { replica } = this
        this.time.later(ms, () => replica.resume())
      },
      stuck: () => this.cut(),
      changed: () => undefined,
      rebuilt: () => undefined,
      status: () => undefined,
      presence: () => undefined,
      refused: () => undefined
    }
    const author = (): { principal: string; device: string } => ({
      principal: this.name,
      device: this.name
    })
    this.replica = new Replica(ID, 'tab', await this.store.load(ID), author, this.time, port)
  }

  say(text: string, draw: Draw): void {
    const { tree } = this.replica.document
    const known = [...tree.entries]
    const fork = known.length > 0 && draw(4) === 0
    this.wrote.push(text)
    this.replica.write({
      kind: 'entry',
      id: entryId(this.time.now(), this.time.random),
      role: 'user',
      text,
      call: null,
      after: fork ? (known[draw(known.length)] ?? ROOT) : tree.last(ROOT),
      fork,
      at: 1,
      slot: null,
      head: false
    })
  }

  connect(): void {
    if (this.connected) return
    this.connected = true
    this.replica.attach(1)
  }

  cut(): void {
    this.connected = false
    this.isIn = false
    this.line = []
    this.sent = []
    this.replica?.detach()
  }

  /** One frame goes over the line, in one direction. */
  carry(patient: boolean, up: boolean): boolean {
    if (!this.connected) return false
    if (up) {
      const frame = this.sent.shift()
      if (frame !== undefined) this.relay.hear(this, frame, patient)
      return frame !== undefined
    }
    const frame = this.line.shift()
    if (frame !== undefined) this.replica.receive(frame)
    return frame !== undefined
  }
}

const texts = (document: Document): string[] =>
  document.tree.view().map(id => document.entry(id, false)?.content ?? '')

/** The lines hold from now on, until nothing moves. */
const carryAll = (relay: Relay): void => {
  for (let quiet = 0; quiet < 3; ) {
    let moved = false
    for (const device of relay.devices) {
      device.connect()
      device.time.advance(100)
      for (const up of [true, false]) while (device.carry(true, up)) moved = true
    }
    quiet = moved ? 0 : quiet + 1
  }
}

/** What is good is there once, what is bad was given back, and everybody has the same. */
const agree = async (relay: Relay): Promise<void> => {
  const all = [...relay.document.tree.entries].map(id => relay.document.entry(id, false)?.content)
  const wrote = relay.devices.flatMap(device => device.wrote)
  expect(all.sort()).toEqual(wrote.filter(text => text.startsWith('good')).sort())
  for (const device of relay.devices) {
    expect(device.replica.waiting).toBe(0)
    expect(texts(device.replica.document)).toEqual(texts(relay.document))
    const lost = device.replica.refused.map(({ intent }) =>
      intent.kind === 'entry' ? intent.text : ''
    )
    expect(lost.sort()).toEqual(device.wrote.filter(text => text.startsWith('bad')).sort())
    // What is on disk is the same.
    await device.load()
    expect(texts(device.replica.document)).toEqual(texts(relay.document))
    const vector = decodeStateVector(encodeStateVector(relay.document.stateVector()))
    expect(covers(device.replica.acknowledgedVector, vector)).toBe(true)
  }
}

const run = async (seed: number): Promise<void> => {
  const random = new FakeTime(seed)
  const draw: Draw = bound => (random.random(new Uint8Array(3))[2] ?? 0) % bound
  const relay = new Relay(draw)
  for (let n = 0; n < 3; n++) {
    const device = new Device(`device ${n}`, 1_000 * seed + n, relay)
    await device.load()
    relay.devices.push(device)
  }
  let said = 0
  for (let step = 0; step < STEPS; step++) {
    const device = relay.devices[draw(3)] as Device
    const what = draw(20)
    if (what < 4) device.say(`${draw(5) === 0 ? 'bad' : 'good'} ${said++}`, draw)
    else if (what < 6) device.connect()
    else if (what === 6) device.cut()
    else if (what === 7 && draw(3) === 0) await device.load()
    else if (what === 8 && draw(10) === 0) relay.loseLog()
    else if (what === 9) device.time.advance(100)
    else device.carry(false, draw(2) === 0)
  }
  carryAll(relay)
  await agree(relay)
}

describe('whatever becomes of lines, updates and pages', () => {
  it.each(Array.from({ length: SEEDS }, (_, seed) => seed + 1))(
    'nothing is lost, nothing is there twice, and all show the same (seed %d)',
    run
  )
})
