/** Opens a websocket. */
export type SocketFactory = (url: string, protocol: string) => WebSocket
