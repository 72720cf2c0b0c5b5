// The build of the page, into the folder of the Python package that the relay serves.

import { defineConfig } from 'vitest/config'
import { precache } from './precache.ts'

export default defineConfig({
  oxc: { jsx: { runtime: 'automatic', importSource: 'preact' } },
  // The provider is built along with the page, from its sources.
  resolve: { conditions: ['source', 'module', 'browser', 'import', 'default'] },
  plugins: [precache('sw.js')],
  build: {
    target: 'es2022',
    outDir: '../../crdt_llm/web',
    emptyOutDir: true,
    // A policy without inline scripts and data: scripts needs every asset as a file.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rolldownOptions: {
      input: { page: 'index.html', sw: 'src/service-worker.ts' },
      output: {
        entryFileNames: chunk => (chunk.name === 'sw' ? 'sw.js' : 'assets/[name]-[hash].js')
      }
    }
  },
  ssr: { resolve: { conditions: ['source', 'module', 'node', 'import', 'default'] } },
  test: {
    include: ['e2e/**/*.test.ts'],
    // Each file starts a relay and a browser of its own; on two cores more would only slow each other.
    fileParallelism: false,
    testTimeout: 60_000,
    hookTimeout: 120_000,
    expect: { poll: { timeout: 20_000, interval: 50 } }
  }
})
