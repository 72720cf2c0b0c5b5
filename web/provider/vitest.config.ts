import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['tests/**/*.test.ts'],
    // For a machine with other work: a revoked token alone is noticed only after 5 s. None is waited for.
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // Relays and nodes run beside them.
    maxWorkers: 2
  }
})
