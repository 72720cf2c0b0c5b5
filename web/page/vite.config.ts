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
    // One server, which most files share, and a browser at a time: on two cores more would only slow
    // each other. The limits are for a machine that has other work; none is waited for.
    globalSetup: ['e2e/setup.ts'],
    fileParallelism: false,
    testTimeout: 120_000,
    hookTimeout: 180_000,
    teardownTimeout: 60_000,
    expect: { poll: { timeout: 30_000, interval: 50 } }
  }
})
