// Who this browser is: the tokens that it was given, one for each principal. A token arrives in the
// address, is kept, and is taken out of the address before anything else happens. It never goes into
// a request line again: the provider sends it in its first frame.

import { remember, remembered, unsent } from './settings'

export interface Identity {
  /** Keeps the data of several accounts in this browser apart. */
  readonly profile: string
  readonly token: string
  /** As the token names it; `''` for a token that names nobody. */
  readonly principal: string
}

const TOKEN_CHARACTERS_MAX = 8 * 1024 // what the relay reads
const PRINCIPAL_CHARACTERS_MAX = 200

/** The principal that a token claims, for telling accounts apart; only the relay can verify it. */
export function principalIn(token: string): string {
  const claims = token.split('.')[1]
  if (claims === undefined) return ''
  try {
    const bytes = Uint8Array.from(
      atob(claims.replaceAll('-', '+').replaceAll('_', '/')),
      character => character.charCodeAt(0)
    )
    const { sub } = JSON.parse(new TextDecoder().decode(bytes)) as { sub?: unknown }
    return typeof sub === 'string' && sub.length <= PRINCIPAL_CHARACTERS_MAX ? sub : ''
  } catch {
    return ''
  }
}

const identityOf = (token: string): Identity => {
  const principal = principalIn(token)
  return { profile: principal ? `principal:${principal}` : 'default', token, principal }
}

function readIdentities(): Identity[] {
  try {
    const stored: unknown = JSON.parse(remembered('tokens') ?? '[]')
    return Array.isArray(stored)
      ? stored.filter((one): one is string => typeof one === 'string').map(identityOf)
      : []
  } catch {
    return []
  }
}

// The one in use is first. It lives in memory too: where storage is forbidden the page still works.
let known = readIdentities()

function keep(identities: Identity[]): void {
  known = identities
  remember('tokens', identities.length ? JSON.stringify(identities.map(one => one.token)) : null)
}

export const identities = (): readonly Identity[] => known

/** Goes on as the principal of a token from the next start on; whether it can be a token at all. */
export function use(token: string): boolean {
  const trimmed = token.trim()
  if (trimmed === '' || trimmed.length > TOKEN_CHARACTERS_MAX || /\s/.test(trimmed)) return false
  const identity = identityOf(trimmed)
  keep([identity, ...known.filter(one => one.profile !== identity.profile)])
  return true
}

export function forget(profile: string): void {
  keep(known.filter(one => one.profile !== profile))
}

/** Deletes what this device keeps of an account: its token, its conversations, its unsent text. */
export async function erase(profile: string): Promise<void> {
  forget(profile)
  unsent.forget()
  for (const { name } of (await indexedDB.databases?.()) ?? []) {
    // As the provider names them: program, profile, relay.
    if (name?.startsWith(`crdt-llm ${profile} `)) await deleted(name)
  }
}

const deleted = (name: string): Promise<void> =>
  new Promise(done => {
    const request = indexedDB.deleteDatabase(name)
    // Another tab still has it open: it goes when that one is closed.
    request.onblocked = () => done()
    request.onsuccess = () => done()
    request.onerror = () => done()
  })

/**
 * Takes a token out of the address, from its fragment (which no request carries) or its query, and
 * keeps it. What else the address says stays.
 */
export function takeTokenFromAddress(): void {
  const address = new URL(location.href)
  const fragment = new URLSearchParams(address.hash.slice(1))
  const token = fragment.get('token') ?? address.searchParams.get('token')
  if (token === null) return
  fragment.delete('token')
  address.searchParams.delete('token')
  address.hash = fragment.toString()
  history.replaceState(null, '', address.pathname + address.search + address.hash)
  use(token)
}

const DEVICE_CHARACTERS_MAX = 200

function guessedDevice(): string {
  const agent = navigator.userAgent
  const system =
    /(iPhone|iPad|Android|Windows|Mac OS X|CrOS|Linux)/
      .exec(agent)?.[1]
      ?.replace('Mac OS X', 'Mac') ?? 'device'
  const browser = /Edg\//.test(agent)
    ? 'Edge'
    : /Firefox\//.test(agent)
      ? 'Firefox'
      : /Chrom(?:e|ium)\//.test(agent)
        ? 'Chrome'
        : /Safari\//.test(agent)
          ? 'Safari'
          : 'Browser'
  return `${browser} on ${system}`
}

export const deviceName = (): string => remembered('device') || guessedDevice()

/** Takes effect at the next start. */
export function nameDevice(name: string): void {
  remember('device', name.trim().slice(0, DEVICE_CHARACTERS_MAX) || null)
}
