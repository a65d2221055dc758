"""Charts as files: SVG with its styles and legend, for programs that show images."""

import re
from collections.abc import Sequence
from html import escape

from service.rendering.content import (
    ReportContent,
    effects_chart,
    metric_bands,
    metric_chart,
    percentile_charts,
)
from service.rendering.svg import COLOURS, DASHES, STYLE_SHEET, WIDTH

ROW_HEIGHT = 20
LIGHT_STYLE = STYLE_SHEET.partition("@media")[0]
"""Styles on white, since the page around an image may have another background than its own text."""


def figure_files(content: ReportContent) -> dict[str, str]:
    """Return the figures of a report by path."""
    report = content.report
    bands = metric_bands(report)
    files = {"figures/curves.svg": svg_file(metric_chart(report, bands), [band.label for band in bands])}
    if (effects := effects_chart(report)) is not None:
        files["figures/effects.svg"] = svg_file(effects)
    for percentiles in content.percentiles:
        for label, chart in percentile_charts(percentiles):
            name = re.sub(r"[^\w.-]+", "-", f"percentiles-{percentiles.layer}-{label}")[:200]
            files[f"figures/{name}.svg"] = svg_file(chart)
    return files


def svg_file(chart: str, labels: Sequence[str] = ()) -> str:
    """Return a chart as an image of its own, with the labels of its series below."""
    height = int(re.findall(r' height="(\d+)"', chart)[0])
    rows = [_row(number, label, height) for number, label in enumerate(labels)]
    total = height + ROW_HEIGHT * len(labels)
    size = f'viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" {size}><style>{LIGHT_STYLE}</style>'
        f"{background}{chart}{''.join(rows)}</svg>"
    )


def _row(number: int, label: str, top: int) -> str:
    y = top + ROW_HEIGHT * number + ROW_HEIGHT // 2
    dash = DASHES[number % len(DASHES)]
    line = f'<line class="line" x1="62" x2="88" y1="{y}" y2="{y}" stroke-dasharray="{dash or "none"}"/>'
    return f'<g class="s{number % len(COLOURS)}">{line}</g><text x="96" y="{y + 4}">{escape(label)}</text>'
