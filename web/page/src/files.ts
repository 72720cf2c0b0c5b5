// Files that leave the page by the browser's own download.

const NAME_CHARACTERS_MAX = 60
const KINDS = { md: 'text/markdown', json: 'application/json' } as const

export function saveAs(text: string, title: string, ending: keyof typeof KINDS): void {
  const name = title
    .replace(/[^\p{L}\p{N} _-]+/gu, ' ')
    .trim()
    .slice(0, NAME_CHARACTERS_MAX)
  const address = URL.createObjectURL(new Blob([text], { type: `${KINDS[ending]};charset=utf-8` }))
  const link = document.createElement('a')
  link.href = address
  link.download = `${name || 'conversation'}.${ending}`
  link.click()
  // The download has begun by the next turn; the browser keeps what it needs of it.
  setTimeout(() => URL.revokeObjectURL(address), 0)
}
