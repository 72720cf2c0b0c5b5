import { expect, it } from 'vitest'
import { Listeners } from '../src/events.js'

it('tells everybody, whatever one of them throws, until they have heard enough', () => {
  const problems: unknown[] = []
  const listeners = new Listeners<{ said: number; other: string }>(error => problems.push(error))
  const heard: number[] = []
  listeners.on('said', value => {
    throw value
  })
  const listener = (value: number): unknown => heard.push(value)
  const stops = [listeners.on('said', listener), listeners.on('said', listener)]
  listeners.tell('said', 1)
  listeners.tell('other', 'nobody listens')
  stops[0]?.()
  stops[0]?.()
  listeners.tell('said', 2)
  expect(heard).toEqual([1, 1, 2])
  expect(problems).toEqual([1, 2])
})
