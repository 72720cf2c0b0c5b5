// Moments and sizes, as people say them.

const sameDay = (a: Date, b: Date): boolean => a.toDateString() === b.toDateString()

const clock = new Intl.DateTimeFormat(undefined, { hour: '2-digit', minute: '2-digit' })
const day = new Intl.DateTimeFormat(undefined, { day: 'numeric', month: 'short' })
const dayOfYear = new Intl.DateTimeFormat(undefined, {
  day: 'numeric',
  month: 'short',
  year: 'numeric'
})
const full = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium' })
const whole = new Intl.NumberFormat()

// An author's clock may say anything; a date holds 8.64e15 ms to either side.
const dateOf = (ms: number): Date => new Date(Math.min(Math.max(ms, 0), 8.64e15))

export function shortTime(ms: number, now = new Date()): string {
  const date = dateOf(ms)
  if (sameDay(date, now)) return clock.format(date)
  return (date.getFullYear() === now.getFullYear() ? day : dayOfYear).format(date)
}

export const fullTime = (ms: number): string => full.format(dateOf(ms))
export const clockTime = (ms: number): string => clock.format(dateOf(ms))
export const machineTime = (ms: number): string => dateOf(ms).toISOString()
export const count = (number: number): string => whole.format(number)
export const plural = (number: number, one: string, many = `${one}s`): string =>
  `${count(number)} ${number === 1 ? one : many}`

export function duration(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`
}
