/** Builds the package as a page would have it, to see what it weighs: `npm run size`. */

import { defineConfig } from 'vite'

export default defineConfig({
  build: {
    outDir: 'node_modules/.size',
    emptyOutDir: true,
    reportCompressedSize: true,
    rolldownOptions: {
      input: 'src/index.ts',
      preserveEntrySignatures: 'strict',
      output: { minify: true }
    }
  }
})
