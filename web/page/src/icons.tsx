// The page's signs, drawn here: no font and no file is fetched for them. All are decoration; the
// control that shows one carries its name.

import type { JSX } from 'preact'

const PATHS = {
  archive: 'M3 5h18v4H3zM5 9v10h14V9M10 13h4',
  back: 'M15 5l-7 7 7 7',
  branch: 'M6 4v16M6 14c0-5 12-2 12-8M18 4v2M6 20v0',
  check: 'M5 12l5 5 9-10',
  chevronDown: 'M6 9l6 6 6-6',
  chevronLeft: 'M14 6l-6 6 6 6',
  chevronRight: 'M10 6l6 6-6 6',
  clock: 'M12 7v5l3 2M12 3a9 9 0 100 18 9 9 0 000-18z',
  close: 'M6 6l12 12M18 6L6 18',
  code: 'M8 8l-4 4 4 4M16 8l4 4-4 4',
  copy: 'M9 9h11v11H9zM5 15H4V4h11v1',
  down: 'M12 5v14M6 13l6 6 6-6',
  edit: 'M4 20h4L19 9l-4-4L4 16zM13 7l4 4',
  erase: 'M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13',
  exit: 'M14 4h5v16h-5M4 12h10M10 8l4 4-4 4',
  keyboard: 'M3 6h18v12H3zM7 10h0M11 10h0M15 10h0M8 14h8',
  menu: 'M4 7h16M4 12h16M4 17h16',
  moon: 'M20 14A8 8 0 0110 4a8 8 0 1010 10z',
  more: 'M5.500 12h.01M12 12h.01M18.500 12h.01M5.500 12a.3.3 0 100 .1M12 12a.3.3 0 100 .1M18.500 12a.3.3 0 100 .1',
  offline:
    'M3 3l18 18M5 12a10 10 0 014-2.5M2 8a15 15 0 014-2.6M19 12a10 10 0 00-3-2M22 8A15 15 0 0012 4.500M9 15.500a4.500 4.500 0 015 0M12 19h.01',
  plus: 'M12 5v14M5 12h14',
  redo: 'M20 11A8 8 0 106 17.500M20 5v6h-6',
  search: 'M11 4a7 7 0 100 14 7 7 0 000-14zM16 16l4 4',
  send: 'M12 19V5M6 11l6-6 6 6',
  settings: 'M4 7h10M18 7h2M4 17h2M10 17h10M16 5v4M8 15v4',
  share: 'M12 15V4M8 7l4-4 4 4M5 12v8h14v-8',
  stop: 'M7 7h10v10H7z',
  sun: 'M12 8a4 4 0 100 8 4 4 0 000-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.500 1.500M17.500 17.500L19 19M5 19l1.500-1.500M17.500 6.500L19 5',
  warning: 'M12 4L2.500 20h19zM12 10v4M12 17h.01'
} as const

export type IconName = keyof typeof PATHS

export function Icon({ name }: { name: IconName }): JSX.Element {
  return (
    <svg
      class="icon"
      viewBox="0 0 24 24"
      width="20"
      height="20"
      aria-hidden="true"
      focusable="false"
    >
      <path
        d={PATHS[name]}
        fill="none"
        stroke="currentColor"
        stroke-width="1.7"
        stroke-linecap="round"
        stroke-linejoin="round"
      />
    </svg>
  )
}
