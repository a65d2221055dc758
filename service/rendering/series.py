"""Series of points for charts: mean and band over seeds, smoothing, thinning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from service.domain.statistics import Curve, finite_points

MAX_POINTS = 800
"""Maximum number of points of a line in a chart."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Mean over runs with the least and the greatest value, by x."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def band_of(label: str, curves: Sequence[Curve]) -> Band:
    """Return the mean and range of curves.

    It has a point where any curve has one. Between their own points, curves are interpolated; beyond the end
    of one, the band is that of the others. Values that are not finite are left out.
    """
    finite = [points for curve in curves if (points := finite_points(curve))]
    steps = sorted({step for points in finite for step, _ in points})
    if not steps:
        return Band(label=label, x=(), mean=(), low=(), high=())
    values = np.array([_interpolated(steps, points) for points in finite])
    mean, low, high = (reduce(values, axis=0).tolist() for reduce in (np.nanmean, np.nanmin, np.nanmax))
    return Band(label=label, x=steps, mean=mean, low=low, high=high)


def _interpolated(places: Sequence[float], points: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Return the values at some places; NaN outside the points."""
    x, y = zip(*points, strict=True)
    found: NDArray[np.float64] = np.interp(places, x, y, left=math.nan, right=math.nan)
    return found


def with_x(band: Band, scale: Sequence[tuple[int, float]]) -> Band:
    """Return a band over another axis, given as pairs of step and x, such as seconds.

    Points outside the pairs are left out.
    """
    if not scale or not band.x:
        return Band(label=band.label, x=(), mean=(), low=(), high=())
    found = _interpolated(band.x, scale).tolist()
    kept = [place for place, x in enumerate(found) if not math.isnan(x)]
    return Band(
        label=band.label,
        x=[found[place] for place in kept],
        mean=[band.mean[place] for place in kept],
        low=[band.low[place] for place in kept],
        high=[band.high[place] for place in kept],
    )


def smoothed(band: Band, weight: float) -> Band:
    """Return a band with smoothed lines."""
    mean, low, high = (smooth(line, weight) for line in (band.mean, band.low, band.high))
    return replace(band, mean=mean, low=low, high=high)


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average; `weight` is that of the past, below 1.

    The start is corrected for its bias, as in Adam, so it does not begin at 0.
    """
    average, smoothed = 0.0, []
    for number, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**number))
    return smoothed


def thin(points: Sequence[tuple[float, float]], max_points: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Return at most `max_points` points with the first, the last, and all extremes.

    The points are divided into buckets; of each its least and its greatest value stay. So a spike of a single
    point remains visible.
    """
    if len(points) <= max_points:
        return list(points)
    inner = points[1:-1]
    buckets = (max_points - 2) // 2
    bounds = [len(inner) * number // buckets for number in range(buckets + 1)]
    kept = [points[0]]
    for start, end in pairwise(bounds):
        bucket = range(start, end)
        extremes = {
            min(bucket, key=lambda place: inner[place][1]),
            max(bucket, key=lambda place: inner[place][1]),
        }
        kept += [inner[place] for place in sorted(extremes)]
    return [*kept, points[-1]]
