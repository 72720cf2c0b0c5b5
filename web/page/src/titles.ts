// Titles of conversations: what stands for one that has none, and the first one it gets.

const TITLE_CHARACTERS = 60

export const titleOf = (title: string): string => title.trim() || 'New conversation'

/** A first title from a first message. */
export function titleFrom(text: string): string {
  const line = text.trim().split('\n', 1)[0] ?? ''
  if (line.length <= TITLE_CHARACTERS) return line
  const cut = line.slice(0, TITLE_CHARACTERS)
  return `${cut.slice(0, cut.lastIndexOf(' ') > 20 ? cut.lastIndexOf(' ') : undefined)}…`
}
