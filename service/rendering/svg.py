"""Charts as SVG: curves with bands over seeds, and intervals of effects.

They need no script and no inline styles: colours are classes of the style sheet of the page, or of
`STYLE_SHEET` in a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from service.domain.statistics import Interval
from service.rendering.axis import Axis, axis_over
from service.rendering.series import Band, thin

COLOURS = ("#1f5fbf", "#c2410c", "#17703c", "#8b2fb0", "#a8231f", "#0f766e", "#7a5100", "#556070")
"""Colours of the series, which repeat; each has a contrast of at least 4.5:1 on white."""
DARK_COLOURS = ("#7fb0ff", "#ff9d5c", "#7fd8a0", "#d79bf2", "#ff9d96", "#5eead4", "#f0c76b", "#b6bfcd")
DASHES = ("", "8 4", "2 4", "10 4 2 4")
"""Patterns of lines, so that series are not distinguished by colour alone."""
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44
ROW_HEIGHT = 34
LABEL_WIDTH = 190
MAX_LABEL_CHARS = 26


def _style_sheet() -> str:
    def rules(colours: Sequence[str], text: str, grid: str) -> str:
        lines = [f".s{number}{{color:{colour}}}" for number, colour in enumerate(colours)]
        return f".chart{{color:{text}}}.chart .grid{{stroke:{grid}}}" + "".join(lines)

    shared = (
        ".chart{font:12px system-ui,sans-serif;max-width:100%;height:auto}"
        ".chart text{fill:currentColor}"
        ".chart .line{fill:none;stroke:currentColor;stroke-width:2}"
        ".chart .area{fill:currentColor;opacity:.16}"
        ".chart .dot{fill:currentColor}.chart .goal{stroke:currentColor;stroke-dasharray:3 4}"
    )
    dark = rules(DARK_COLOURS, "#e6e9ef", "#343c4b")
    return shared + rules(COLOURS, "#1b2230", "#d5d9e1") + f"@media (prefers-color-scheme:dark){{{dark}}}"


STYLE_SHEET = _style_sheet()


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Labels and scales of a chart."""

    title: str
    """Text for readers who do not see the chart."""
    x_label: str
    y_label: str
    goal: float | None = None
    """Value with a dashed line."""
    is_log_x: bool = False
    is_log_y: bool = False
    colours: Sequence[int] | None = None
    """Number of each series' colour; default: 0, 1, 2 …"""
    y_values: Sequence[float] = ()
    """Further values that the axis spans, such as those of a chart next to it."""


def curves_chart(bands: Sequence[Band], frame: Frame) -> str:
    """Return a chart with a line per band, and the area of its range."""
    x_axis = axis_over((x for band in bands for x in band.x), LEFT, WIDTH - RIGHT, is_log=frame.is_log_x)
    values = [value for band in bands for value in (*band.low, *band.high)]
    goal = [] if frame.goal is None else [frame.goal]
    y_axis = axis_over([*values, *goal, *frame.y_values], HEIGHT - BOTTOM, TOP, is_log=frame.is_log_y)
    parts = [_axes(x_axis, y_axis, frame)]
    if frame.goal is not None and math.isfinite(frame.goal):
        y = y_axis.place(frame.goal)
        parts.append(f'<line class="goal" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    for number, band in enumerate(bands):
        colour = number if frame.colours is None else frame.colours[number]
        parts.append(_band(band, colour, x_axis, y_axis))
    return _svg(WIDTH, HEIGHT, frame.title, parts)


def legend(labels: Sequence[str]) -> str:
    """Return the legend of `curves_chart` as an HTML list."""
    items = []
    for number, label in enumerate(labels):
        line = f'<line class="line" x1="0" x2="26" y1="6" y2="6"{_dash(number)}/>'
        swatch = f'<svg class="chart" width="26" height="12" aria-hidden="true">{_group(number, line)}</svg>'
        items.append(f"<li>{swatch} {escape(label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


@dataclass(frozen=True)
class IntervalRow:
    """Estimate and interval of one variant; None where unknown."""

    label: str
    estimate: float | None
    interval: Interval | None
    colour: int


def intervals_chart(
    rows: Sequence[IntervalRow], title: str, axis_label: str, none: float, *, is_log: bool
) -> str:
    """Return a chart of intervals, with a dashed line at `none`.

    An infinite end is an arrow at the edge.
    """
    ends = [end for row in rows if row.interval for end in (row.interval.low, row.interval.high)]
    values = [none, *(row.estimate for row in rows if row.estimate is not None), *ends]
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    spanned = axis_over(values, LEFT + LABEL_WIDTH, WIDTH - RIGHT - 10, is_log=is_log)
    axis = _padded(spanned)
    x = axis.place(none)
    bottom = height - BOTTOM
    parts = [
        *(_x_tick(axis.place(value), bottom, label, TOP) for value, label in axis.ticks()),
        _text((LEFT + LABEL_WIDTH + WIDTH) / 2, height - 8, axis_label),
        f'<line class="goal" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>',
        *(_interval(row, number, axis) for number, row in enumerate(rows)),
    ]
    return _svg(WIDTH, height, title, parts)


def shortened(label: str) -> str:
    """Return a label that has room in a chart of intervals."""
    return label if len(label) <= MAX_LABEL_CHARS else f"{label[: MAX_LABEL_CHARS - 1]}…"


def _padded(axis: Axis) -> Axis:
    """Leave a margin at both ends, so that no mark touches the edge."""
    if axis.is_log:
        margin = (axis.high / axis.low) ** 0.08
        return Axis(
            low=axis.low / margin, high=axis.high * margin, start=axis.start, end=axis.end, is_log=True
        )
    margin = (axis.high - axis.low) * 0.08
    return Axis(low=axis.low - margin, high=axis.high + margin, start=axis.start, end=axis.end)


def _interval(row: IntervalRow, number: int, axis: Axis) -> str:
    y = TOP + ROW_HEIGHT * number + ROW_HEIGHT / 2
    label = escape(shortened(row.label))
    parts = [f'<text x="{LEFT + LABEL_WIDTH - 12}" y="{y + 4}" text-anchor="end">{label}</text>']
    if row.interval is not None:
        for end, sign in ((row.interval.low, -1), (row.interval.high, 1)):
            x = axis.place(end)
            is_open = math.isinf(end) or (axis.is_log and end <= 0)
            tip = (
                f"M{x - 6 * sign} {y - 6}L{x} {y}L{x - 6 * sign} {y + 6}"
                if is_open
                else f"M{x} {y - 7}V{y + 7}"
            )
            parts.append(f'<path class="line" d="{tip}"/>')
        low, high = axis.place(row.interval.low), axis.place(row.interval.high)
        parts.append(f'<path class="line" d="M{low} {y}H{high}"/>')
    if row.estimate is not None:
        parts.append(f'<circle class="dot" cx="{axis.place(row.estimate)}" cy="{y}" r="5"/>')
    return _group(row.colour, "".join(parts))


def _band(band: Band, number: int, x_axis: Axis, y_axis: Axis) -> str:
    def places(values: Sequence[float]) -> list[str]:
        return [
            f"{x_axis.place(x)} {y_axis.place(y)}" for x, y in thin(list(zip(band.x, values, strict=True)))
        ]

    if not band.x:
        return ""
    line = f'<path class="line" d="M{"L".join(places(band.mean))}"{_dash(number)}/>'
    if len(band.x) == 1:
        line = f'<circle class="dot" cx="{x_axis.place(band.x[0])}" cy="{y_axis.place(band.mean[0])}" r="3"/>'
    area = ""
    if list(band.low) != list(band.high):
        area = (
            f'<path class="area" d="M{"L".join(places(band.low))}L{"L".join(reversed(places(band.high)))}Z"/>'
        )
    return _group(number, area + line)


def _axes(x_axis: Axis, y_axis: Axis, frame: Frame) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [_x_tick(x_axis.place(value), bottom, label, TOP) for value, label in x_axis.ticks()]
    for value, label in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    middle = (TOP + bottom) / 2
    parts.append(
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, frame.x_label)
        + f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">'
        f"{escape(frame.y_label)}</text>"
    )
    return "".join(parts)


def _x_tick(x: float, bottom: float, label: str, top: float) -> str:
    return (
        f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
        f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(text)}</text>'


def _group(number: int, content: str) -> str:
    """Return content in the colour of a series."""
    return f'<g class="s{number % len(COLOURS)}">{content}</g>'


def _dash(number: int) -> str:
    pattern = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""
