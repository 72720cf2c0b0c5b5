/** The real relay as a child process (see relay.py), and providers on it. */

import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import WebSocket from 'ws'
import {
  type ClientOptions,
  MemoryStore,
  type SocketFactory,
  type SocketLike
} from '../src/index.js'

/** The Python that has the relay. */
export const PYTHON =
  process.env.CRDT_LLM_PYTHON ??
  fileURLToPath(new URL('../../../.venv/bin/python', import.meta.url))

/** A path beside this file. */
export const path = (relative: string): string => fileURLToPath(new URL(relative, import.meta.url))

export class Relay {
  private process: ChildProcess | null = null
  private folder = ''
  private port = 0

  /** Starts it, at the same port as before; `anew` has lost its log. */
  async start(anew = false): Promise<void> {
    if (anew || this.folder === '') {
      this.remove()
      this.folder = mkdtempSync(join(tmpdir(), 'crdt-llm-provider-'))
    }
    const process = spawn(PYTHON, [path('relay.py'), this.folder, String(this.port)], {
      stdio: ['pipe', 'pipe', 'inherit'],
      cwd: path('../../..')
    })
    this.process = process
    for await (const line of createInterface({ input: process.stdout })) {
      this.port = Number(line.split(' ')[1])
      return // it ends with its standard input, so with this process at the latest
    }
    throw new Error('the relay ended before it was ready')
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}`
  }

  async stop(): Promise<void> {
    const { process } = this
    this.process = null
    if (process === null) return
    const ended = new Promise(resolve => process.once('exit', resolve))
    process.stdin?.end()
    await ended
  }

  remove(): void {
    if (this.folder !== '') rmSync(this.folder, { recursive: true, force: true })
  }

  options(more: Partial<ClientOptions> = {}): ClientOptions {
    return {
      url: this.url,
      token: 'owner',
      device: 'test',
      store: new MemoryStore(),
      socket: realSocket,
      ...more
    }
  }
}

export const realSocket: SocketFactory = (url, protocol) =>
  new WebSocket(url, protocol) as unknown as SocketLike

/** Sockets of which no frame arrives while `deaf`. */
export class DeafLine {
  deaf = false
  private last: SocketLike | null = null

  readonly socket: SocketFactory = (url, protocol) => {
    const real = realSocket(url, protocol)
    this.last = real
    const line = this
    return new Proxy(real, {
      get: (target, key) => {
        const value: unknown = Reflect.get(target, key)
        return typeof value === 'function' ? value.bind(target) : value
      },
      set: (target, key, value) => {
        const heard =
          key === 'onmessage' && value !== null
            ? (event: unknown) => {
                if (!line.deaf) value(event)
              }
            : value
        return Reflect.set(target, key, heard)
      }
    })
  }

  /** The line breaks. */
  cut(): void {
    this.last?.close()
  }
}

/** Resolves once `holds`; `on` subscribes to whatever may change that. */
export const until = (holds: () => boolean, on: (look: () => void) => () => void): Promise<void> =>
  new Promise(resolve => {
    if (holds()) return resolve()
    const stop = on(() => {
      if (!holds()) return
      stop()
      resolve()
    })
  })
