// Another program that takes part: the provider in Node, for what no button of the page asks for.

import { type Client, type ClientOptions, MemoryStore, openClient } from 'crdt-llm-provider'
import WebSocket from 'ws'
import { ending, type Stack } from './stack'

export async function hand(stack: Stack, more: Partial<ClientOptions> = {}): Promise<Client> {
  const client = await openClient({
    url: stack.url,
    token: stack.token,
    device: 'Program',
    store: new MemoryStore(),
    socket: (url: string, protocol: string) => new WebSocket(url, protocol) as never,
    ...more
  })
  ending(() => client.close())
  return client
}
