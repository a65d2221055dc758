// Follow the end of the log, unless the reader has scrolled up, and bound its lines.
const MAX_LINES = 5000;
const log = document.getElementById("log");
let isAtEnd = true;
if (log) {
  log.scrollTop = log.scrollHeight;
  log.addEventListener("htmx:beforeSwap", () => {
    isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  });
  log.addEventListener("htmx:afterSwap", () => {
    while (log.childElementCount > MAX_LINES) log.firstElementChild.remove();
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  });
}
