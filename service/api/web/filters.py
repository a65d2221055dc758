"""Filters of the templates: times, durations and numbers as text."""

import json
import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def ago(moment: datetime, now: datetime) -> str:
    """Return the time since a moment: `3 min ago`."""
    seconds = (now - moment).total_seconds()
    if seconds < 5:
        return "just now"
    count, unit, *_ = duration(seconds).split()
    return f"{count} {unit} ago"


def duration(seconds: float) -> str:
    """Return a duration with its two largest units: `2 h 5 min`."""
    whole = max(0, round(seconds))
    for size, unit in UNITS:
        if whole >= size:
            count, rest = divmod(whole, size)
            smaller = next((entry for entry in (*UNITS, (1, "s")) if entry[0] < size), (1, "s"))
            more = rest // smaller[0]
            return f"{count} {unit}" + (f" {more} {smaller[1]}" if more else "")
    return f"{whole} s"


def stamp(moment: datetime) -> str:
    """Return a moment in UTC, to the second."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def number(value: float | None) -> str:
    """Return a number with four significant digits; none and not-finite ones as signs."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def plain(value: Any) -> str:
    """Return a value of a spec as text: words as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


FILTERS: dict[str, Callable[..., str]] = {
    "ago": ago,
    "duration": duration,
    "stamp": stamp,
    "number": number,
    "plain": plain,
}
