import type { Client, ClientOptions } from './api.js'
import { ProviderError } from './errors.js'

/**
 * Open this device's conversations and begin to connect.
 *
 * @throws ProviderError `misuse` for malformed options, `store` if storage cannot be opened at all.
 */
export const openClient = async (options: ClientOptions): Promise<Client> => {
  throw new ProviderError('misuse', `not ready: ${options.url}`)
}
