// A part of a page that is fetched again keeps what the reader has opened, closed or scrolled in it.
(() => {
  let opened = new Map();
  let scrolled = new Map();

  document.addEventListener("htmx:beforeSwap", (event) => {
    const within = (selector) => [...event.detail.target.querySelectorAll(selector)];
    opened = new Map(within("details[id]").map((each) => [each.id, each.open]));
    scrolled = new Map(within(".scroll[id]").map((each) => [each.id, [each.scrollLeft, each.scrollTop]]));
  });

  document.addEventListener("htmx:afterSwap", () => {
    for (const [id, isOpen] of opened) {
      const details = document.getElementById(id);
      if (details) { details.open = isOpen; }
    }
    for (const [id, [left, top]] of scrolled) { document.getElementById(id)?.scrollTo(left, top); }
    opened.clear();
    scrolled.clear();
  });
})();
