// Opens the page without a network. Every build is a cache of its own, complete or not there at all; the
// one before it stays, for pages that are still open and load a piece late. What is not part of the
// page (health, metrics, sockets) never passes through here.

export type {}

declare const self: ServiceWorkerGlobalScope

interface Precached {
  readonly version: string
  readonly files: readonly string[]
}

// The build puts them here.
const { version, files } = 'precached files' as unknown as Precached

const PREFIX = 'page-'
const NAME = `${PREFIX}${version}`
const CACHES_KEPT = 2 // this build, and the one that may still be open somewhere

self.addEventListener('install', event => {
  const fill = async (): Promise<void> => {
    const cache = await caches.open(NAME)
    // Past the browser's own cache: what is kept must be what this build made.
    await cache.addAll(files.map(file => new Request(file, { cache: 'reload' })))
    await self.skipWaiting()
  }
  event.waitUntil(fill())
})

self.addEventListener('activate', event => {
  const clear = async (): Promise<void> => {
    const names = (await caches.keys()).filter(name => name.startsWith(PREFIX) && name !== NAME)
    // In the order in which they were made.
    const old = names.slice(0, Math.max(0, names.length - (CACHES_KEPT - 1)))
    await Promise.all(old.map(name => caches.delete(name)))
    await self.clients.claim()
  }
  event.waitUntil(clear())
})

const known = new Set(files)

self.addEventListener('fetch', event => {
  const { request } = event
  const address = new URL(request.url)
  if (request.method !== 'GET' || address.origin !== self.location.origin) return
  if (request.mode === 'navigate' && address.pathname === '/') {
    event.respondWith(kept('/', request))
  } else if (known.has(address.pathname) || address.pathname.startsWith('/assets/')) {
    event.respondWith(kept(address.pathname, request))
  }
})

async function kept(path: string, request: Request): Promise<Response> {
  const cache = await caches.open(NAME)
  // A piece of the build before this one is in that one's cache.
  return (await cache.match(path)) ?? (await caches.match(path)) ?? fetch(request)
}
