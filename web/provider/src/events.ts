/**
 * Listeners by name.
 *
 * This module owns subscribing and telling. It must not know what is told.
 */

import type { Unsubscribe } from './api.js'

/** Listeners for the events of `Events`. */
export class Listeners<Events> {
  private readonly byName = new Map<keyof Events, Set<(value: never) => void>>()

  /** @param report Is given what listeners throw; by default that is thrown where nobody waits. */
  constructor(private readonly report: (error: unknown) => void = throwLater) {}

  /** Call `listener` at each event of that name, until the answer is called. */
  on<Name extends keyof Events>(name: Name, listener: (value: Events[Name]) => void): Unsubscribe {
    const listeners = this.byName.get(name) ?? new Set()
    this.byName.set(name, listeners)
    // A function of its own, so that one listener may subscribe twice.
    const own = (value: Events[Name]): void => listener(value)
    listeners.add(own)
    return () => {
      listeners.delete(own)
    }
  }

  /** Tell everybody; what one listener throws does not keep it from others. */
  tell<Name extends keyof Events>(name: Name, value: Events[Name]): void {
    for (const listener of [...(this.byName.get(name) ?? [])]) {
      try {
        ;(listener as (value: Events[Name]) => void)(value)
      } catch (error) {
        this.report(error)
      }
    }
  }
}

const throwLater = (error: unknown): void =>
  queueMicrotask(() => {
    throw error
  })
