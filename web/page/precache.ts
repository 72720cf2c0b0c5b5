// Tells the service worker what the page consists of: every file of the build, and one version for
// all of them.

import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Plugin } from 'vite'

const PLACE = /(["'`])precached files\1/

/** Puts `{ version, files }` where the worker says 'precached files'. */
export function precache(worker: string): Plugin {
  let publicFolder = ''
  return {
    name: 'precache',
    apply: 'build',
    configResolved(config) {
      publicFolder = config.publicDir
    },
    generateBundle: {
      order: 'post',
      handler(_options, bundle) {
        const hash = createHash('sha256')
        const files = ['/']
        for (const [name, file] of Object.entries(bundle).sort(([a], [b]) => (a < b ? -1 : 1))) {
          hash.update(name).update(file.type === 'chunk' ? file.code : file.source)
          if (name !== worker && name !== 'index.html') files.push(`/${name}`)
        }
        for (const name of readdirSync(publicFolder).sort()) {
          hash.update(name).update(readFileSync(join(publicFolder, name)))
          files.push(`/${name}`)
        }
        const chunk = bundle[worker]
        if (chunk?.type !== 'chunk' || !PLACE.test(chunk.code)) {
          throw new Error(`${worker} has no place for the list of files`)
        }
        const version = hash.digest('base64url').slice(0, 16)
        chunk.code = chunk.code.replace(PLACE, () => JSON.stringify({ version, files }))
      }
    }
  }
}
