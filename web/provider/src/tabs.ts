/** Locks and messages between tabs. */
export type Tabs = object
