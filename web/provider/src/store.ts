/** Where replicas are kept. */
export type Store = object
