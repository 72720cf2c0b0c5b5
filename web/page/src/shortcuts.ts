// The keys of the page: one table, which the help shows and the README documents.

export const SHORTCUTS: readonly { readonly keys: readonly string[]; readonly does: string }[] = [
  { keys: ['Enter'], does: 'Send' },
  { keys: ['Shift', 'Enter'], does: 'New line' },
  { keys: ['Ctrl', 'Shift', 'O'], does: 'New conversation' },
  { keys: ['Ctrl', 'K'], does: 'Search conversations' },
  { keys: ['Alt', '↑ ↓'], does: 'Previous or next conversation' },
  { keys: ['Esc'], does: 'Stop the reply; close what is open; back to the message field' },
  { keys: ['↑'], does: 'In an empty message field: to the last message' },
  { keys: ['↑ ↓'], does: 'In the messages: previous or next' },
  { keys: ['Home', 'End'], does: 'In the messages: first or last' },
  { keys: ['← →'], does: 'On a message: the other versions of it' },
  { keys: ['C'], does: 'On a message: copy' },
  { keys: ['E'], does: 'On a message: edit as a new branch' },
  { keys: ['R'], does: 'On a reply: ask again' },
  { keys: ['Delete'], does: 'On a message: withdraw' },
  { keys: ['Ctrl', 'Shift', 'M'], does: 'Map of the branches' },
  { keys: ['Ctrl', 'Shift', 'D'], does: 'Developer view' },
  { keys: ['?'], does: 'This table' }
]
