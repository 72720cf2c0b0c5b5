// Before the first paint: the chosen theme, so that a dark page never flashes white.
try {
  const theme = localStorage.getItem('crdt-llm.theme')
  if (theme) document.documentElement.setAttribute('data-theme', theme)
} catch {
  // Storage is forbidden: the system's theme it is.
}
