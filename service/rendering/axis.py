"""Axes of charts: ranges, ticks and their labels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Linear or logarithmic axis over `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value, which is moved into the range."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        share = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Return about `count` round values with their labels."""
        values = self._log_ticks(count) if self.is_log else self._linear_ticks(count)
        return [(value, label_of(value)) for value in values]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.is_log else value

    def _linear_ticks(self, count: int) -> list[float]:
        rough = (self.high - self.low) / max(count, 1)
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        # Few decades get ticks within them.
        factors = (1, 2, 5) if last - first <= count // 2 else (1,)
        every = max(1, math.ceil((last - first) / count))
        values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def axis_over(values: Iterable[float], start: float, end: float, *, is_log: bool = False) -> Axis:
    """Return an axis over the finite values (on a logarithmic one, those above 0).

    Equal values and none get a range around them.
    """
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    low, high = (min(finite), max(finite)) if finite else ((0.1, 1.0) if is_log else (0.0, 1.0))
    if low == high:
        low, high = (
            (low / 2, high * 2) if is_log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        )
    return Axis(low=low, high=high, start=start, end=end, is_log=is_log)


def label_of(value: float) -> str:
    """Return a short label: `0`, `0.05`, `1,500`, `20k`, `1e-05`."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}"
    if abs(value) >= 10_000:
        return f"{value / 1_000:,.4g}k"
    return f"{value:,.4g}"
