// Before the first paint, so that the page does not flash: the theme chosen here earlier, else the system's.
try {
  const chosen = localStorage.getItem("ironclip-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // No storage allowed: the system's theme it is.
}
