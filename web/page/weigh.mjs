// What the page weighs on its way to a browser: all of it, compressed. Fails the build if that is
// more than it may be.

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'

const FOLDER = new URL('../../crdt_llm/web/', import.meta.url).pathname
const BYTES_MAX = 250_000

let total = 0
for (const found of readdirSync(FOLDER, { recursive: true, withFileTypes: true })) {
  if (!found.isFile()) continue
  const path = join(found.parentPath, found.name)
  const bytes = gzipSync(readFileSync(path), { level: 9 }).length
  total += bytes
  process.stdout.write(`${String(bytes).padStart(8)}  ${path.slice(FOLDER.length)}\n`)
}
process.stdout.write(`${String(total).padStart(8)}  bytes compressed, of ${BYTES_MAX}\n`)
if (total > BYTES_MAX) {
  process.stderr.write('the page has become too heavy\n')
  process.exitCode = 1
}
