// `crdt-llm serve` as a user runs it, as a child of the tests, with a tiny model of random weights or none.
// It must not know vitest: one server is started before any test file is (setup.ts).

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import {
  createWriteStream,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as pause } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

const ROOT = fileURLToPath(new URL('../../../', import.meta.url))
const PYTHON = process.env.CRDT_LLM_PYTHON ?? join(ROOT, '.venv/bin/python')
const READY_MS_MAX = 120_000
/** Then it is killed: ending keeps what is under way, which takes a moment. */
const END_MS_MAX = 30_000

/** More positions than the tiny model has, so that long conversations fit its context. */
const POSITIONS = 131_072

const folderOf = (what: string): string => mkdtempSync(join(tmpdir(), `crdt-llm-${what}-`))

/** Makes the tiny model in a folder, and gives it room. */
export function buildModel(folder: string): string {
  const model = join(folder, 'tiny')
  const made = spawnSync(
    PYTHON,
    [
      '-c',
      'import sys; from pathlib import Path; from tiny_model import build_tiny_model; build_tiny_model(Path(sys.argv[1]))',
      model
    ],
    { env: { ...process.env, PYTHONPATH: join(ROOT, 'tests') }, encoding: 'utf8' }
  )
  if (made.status !== 0) throw new Error(`no tiny model: ${made.stderr}`)
  for (const [name, key] of [
    ['config.json', 'max_position_embeddings'],
    ['tokenizer_config.json', 'model_max_length']
  ] as const) {
    const path = join(model, name)
    const config = JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>
    writeFileSync(path, JSON.stringify({ ...config, [key]: POSITIONS }))
  }
  return model
}

/** Where a running server is, for whoever did not start it. */
export interface Place {
  readonly url: string
  readonly folder: string
}

/** Servers end with the process that started them, however it ends. */
const running = new Set<ChildProcess>()
process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL')
})

export class Server {
  url: string
  #process: ChildProcess | null = null
  #port = 0

  /**
   * @param model The folder of a model; `null` for none.
   * @param place Where another process runs it; it cannot be started or stopped from here then.
   */
  constructor(
    readonly model: string | null,
    private readonly place: Place | null = null,
    readonly folder = place?.folder ?? folderOf('page')
  ) {
    this.url = place?.url ?? ''
  }

  get data(): string {
    return join(this.folder, 'data')
  }

  get token(): string {
    return readFileSync(join(this.data, 'owner.token'), 'utf8').trim()
  }

  /** The operator's key for hidden fields, as hexadecimal digits. */
  get masterKey(): string {
    return readFileSync(join(this.data, 'keys/master.key')).toString('hex')
  }

  get messages(): string {
    const path = join(this.folder, 'serve.log')
    return existsSync(path) ? readFileSync(path, 'utf8') : ''
  }

  async start(): Promise<void> {
    if (this.place !== null) throw new Error('others use this server: start one of your own')
    const words = ['-m', 'crdt_llm', 'serve', '--data', this.data, '--port', String(this.#port)]
    words.push(...(this.model === null ? ['--no-node'] : ['--model', this.model]))
    // In torch's operations: natively the tiny model ends its longest reply before a page has
    // loaded, and what happens in mid-reply could not be seen.
    const env = { ...process.env, CXX: 'no-compiler' }
    const child = spawn(PYTHON, words, { env, stdio: ['ignore', 'pipe', 'pipe'] })
    this.#process = child
    running.add(child)
    child.once('exit', () => running.delete(child))
    child.stderr?.pipe(createWriteStream(join(this.folder, 'serve.log'), { flags: 'a' }))
    const ready = (async () => {
      for await (const line of createInterface({ input: child.stdout as NodeJS.ReadableStream })) {
        if (line.startsWith('ready ')) return line.split(' ')[1] ?? ''
      }
      throw new Error(`the server ended: ${this.messages}`)
    })()
    const late = setTimeout(() => child.kill('SIGKILL'), READY_MS_MAX)
    try {
      this.url = new URL(await ready).origin
    } finally {
      clearTimeout(late)
    }
    child.stdout?.resume() // what else it says must not fill the pipe
    this.#port = Number(new URL(this.url).port)
    if (this.model !== null) await this.#untilNodeIsReady()
  }

  async #untilNodeIsReady(): Promise<void> {
    const late = AbortSignal.timeout(READY_MS_MAX)
    while ((await fetch(`${this.url}/readyz`, { signal: late })).status !== 200) {
      if (this.#process === null || !running.has(this.#process)) throw new Error(this.messages)
      await pause(100)
    }
  }

  /** A signed token of somebody else. */
  tokenOf(principal: string): string {
    const words = ['-m', 'crdt_llm', 'token', 'issue', principal, '--data', this.data, '--json']
    const made = spawnSync(PYTHON, words, { encoding: 'utf8' })
    if (made.status !== 0) throw new Error(`no token: ${made.stderr}`)
    return (JSON.parse(made.stdout) as { token: string }).token
  }

  /** Ends the server; with SIGKILL as a power cut does. */
  async stop(signal: 'SIGTERM' | 'SIGKILL' = 'SIGTERM'): Promise<void> {
    const child = this.#process
    if (child === null || !running.has(child)) return
    const ended = once(child, 'exit')
    child.kill(signal)
    const late = setTimeout(() => child.kill('SIGKILL'), END_MS_MAX)
    await ended
    clearTimeout(late)
  }

  async remove(): Promise<void> {
    if (this.place !== null) return // it is not ours
    await this.stop()
    rmSync(this.folder, { recursive: true, force: true })
  }
}
