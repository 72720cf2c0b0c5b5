// Before the first file: the tiny model, and the server that all files share which do not stop theirs.

import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TestProject } from 'vitest/node'
import { buildModel, type Place, Server } from './server'

declare module 'vitest' {
  export interface ProvidedContext {
    model: string
    shared: Place
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const folder = mkdtempSync(join(tmpdir(), 'crdt-llm-model-'))
  const server = new Server(buildModel(folder))
  const remove = async (): Promise<void> => {
    await server.remove()
    rmSync(folder, { recursive: true, force: true })
  }
  try {
    await server.start()
  } catch (error) {
    await remove()
    throw error
  }
  project.provide('model', server.model ?? '')
  project.provide('shared', { url: server.url, folder: server.folder })
  return remove
}
