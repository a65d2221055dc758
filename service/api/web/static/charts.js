// Replaces the drawn curves by ones that can be zoomed and read off. Without this script the drawn ones stay.
(() => {
  const DASHES = [[], [8, 4], [2, 4], [10, 4, 2, 4]];
  const MIN_WIDTH = 300;
  const shown = new Map();

  function colourOf(number) {
    const probe = document.createElement("span");
    probe.className = `s${number % 8}`;
    document.body.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
  }

  function translucent(colour) {
    return colour.replace("rgb(", "rgba(").replace(")", ", 0.16)");
  }

  function draw(figure, curves) {
    const text = getComputedStyle(document.body).color;
    const grid = getComputedStyle(document.documentElement).getPropertyValue("--line");
    const series = [{ label: curves.x_label }];
    const bands = [];
    const data = [curves.x];
    curves.bands.forEach((band, number) => {
      const colour = colourOf(number);
      const first = series.length;
      series.push({ label: band.label, stroke: colour, width: 2, dash: DASHES[number % 4], spanGaps: true, points: { show: false } });
      for (const edge of ["greatest", "least"]) {
        series.push({ label: `${band.label} ${edge}`, class: "edge", stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
      }
      bands.push({ series: [first + 1, first + 2], fill: translucent(colour) });
      data.push(band.mean, band.high, band.low);
    });
    if (curves.target !== null) {
      series.push({ label: "target", stroke: text, width: 1, dash: [3, 4], points: { show: false } });
      data.push(curves.x.map(() => curves.target));
    }
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    const width = figure.clientWidth;
    figure.replaceChildren();
    return new uPlot({
      width, height: Math.max(260, Math.min(420, width / 2)), series, bands,
      legend: { show: true },
      scales: { x: { time: false, distr: curves.log.includes("x") ? 3 : 1 }, y: { distr: curves.log.includes("y") ? 3 : 1 } },
      axes: [{ ...axis, label: curves.x_label }, { ...axis, label: curves.metric, size: 60 }],
    }, data, figure);
  }

  async function enhance(figure) {
    if (figure.clientWidth < MIN_WIDTH) { return; }
    const answer = await fetch(figure.dataset.curves);
    if (!answer.ok) { return; }
    const curves = await answer.json();
    if (curves.x.length < 2 || !figure.isConnected) { return; }
    shown.get(figure)?.destroy();
    shown.set(figure, draw(figure, curves));
    figure.setAttribute("role", "img");
    figure.setAttribute("aria-label", curves.title);
  }

  function enhanceAll() {
    for (const figure of [...shown.keys()].filter((each) => !each.isConnected)) {
      shown.get(figure).destroy();
      shown.delete(figure);
    }
    document.querySelectorAll("figure[data-curves]").forEach(enhance);
  }

  document.addEventListener("change", (event) => { event.target.closest?.(".filters")?.requestSubmit(); });
  document.addEventListener("htmx:afterSwap", enhanceAll);
  window.addEventListener("DOMContentLoaded", enhanceAll);
  let waiting;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(enhanceAll, 200); });
})();
