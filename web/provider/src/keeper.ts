/**
 * The way from a replica to its store: in order, in batches, again after a failure.
 *
 * This module owns the queue of steps. It must not know what they mean. What somebody waits for goes
 * at once and takes along what waits before it; what came from the relay waits a moment for company,
 * because the relay has it anyway.
 */

import type { Environment } from './environment.js'
import type { Step, Store } from './store.js'

/** How long merged updates wait: a streaming reply costs five writes a second then. */
export const WINDOW_MS = 200
/** After a failure it is tried again in a while, or with the next urgent steps. */
export const RETRY_MS = 5_000
/** Steps in one write, so that one transaction stays short. */
const STEPS_MAX = 1_024

/** Keeps the steps of one conversation. */
export class Keeper {
  private waiting: Step[] = []
  private cancel: (() => void) | null = null
  private running: Promise<void> | null = null
  private compacting = false
  private ended = false

  /**
   * @param merge Puts updates together.
   * @param failed Hears of failures; the steps stay, and are tried again.
   */
  constructor(
    private readonly store: Store,
    private readonly conversation: string,
    private readonly merge: (updates: readonly Uint8Array[]) => Uint8Array,
    private readonly environment: Environment,
    private readonly failed: (error: unknown) => void
  ) {}

  /** Keep these. */
  keep(steps: readonly Step[], urgent: boolean): void {
    this.waiting.push(...steps)
    if (urgent) void this.flush()
    else this.schedule(WINDOW_MS)
  }

  /** Put everything together that is kept. */
  compact(): void {
    this.compacting = true
    this.schedule(WINDOW_MS)
  }

  /** Resolves when everything so far was kept, or could not be (`failed` heard of it). */
  flush(): Promise<void> {
    this.cancel?.()
    this.cancel = null
    this.running ??= this.run().finally(() => {
      this.running = null
    })
    return this.running
  }

  /** Keep what waits, and nothing more. */
  async close(): Promise<void> {
    await this.flush()
    this.ended = true
    this.cancel?.()
  }

  private schedule(ms: number): void {
    if (this.ended) return
    this.cancel ??= this.environment.later(ms, () => {
      this.cancel = null
      void this.flush()
    })
  }

  private async run(): Promise<void> {
    try {
      while (this.waiting.length > 0) {
        const steps = this.waiting.slice(0, STEPS_MAX)
        await this.store.write(this.conversation, steps)
        this.waiting.splice(0, steps.length)
      }
      if (this.compacting) {
        this.compacting = false
        await this.store.compact(this.conversation, this.merge)
      }
    } catch (error) {
      this.failed(error)
      this.schedule(RETRY_MS)
    }
  }
}
