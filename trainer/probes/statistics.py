"""Statistics of layer moments and values, in float64 over all workers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from syncbn import Moments

PERCENTILES = (15, 50, 85)
"""Percentiles of Ioffe & Szegedy 2015, Figure 1 (b, c)."""


def percentiles(values: Tensor) -> dict[int, float]:
    """Return the 15th, 50th and 85th percentile of `values` (n,), interpolated."""
    with np.errstate(invalid="ignore"):  # interpolation between infinities, as in a diverging run
        found = np.percentile(values.double().numpy(), PERCENTILES)
    return dict(zip(PERCENTILES, found.tolist(), strict=True))


def discrepancy(parts: Sequence[Moments]) -> float:
    """Return the distance of the means of parts from the mean of the batch.

        mean over parts and channels of |μ_part - μ| / σ

    For W independent parts of b samples each it is about √(2/(π·b) · (1 - 1/W)). Empty parts, and channels
    without variance, are left out.
    """
    total = Moments.merge(parts)
    distances = torch.stack([(part.mean - total.mean).abs() for part in parts if part.count > 0]).mean(0)
    return _mean_ratio(distances, total.variance.sqrt())


def variance_share(parts: Sequence[Moments]) -> float:
    """Return the share of a batch's variance that is between its parts.

        mean over channels of 1 - Σᵢ M2ᵢ / M2

    This is the mean of SyncBatchNorm's `between_worker_variance_share`. Channels without variance count as 0.
    """
    total = Moments.merge(parts)
    within = torch.stack([part.m2 for part in parts]).sum(0)
    return float(torch.where(total.m2 > 0, 1 - within / total.m2, 0).clamp(0, 1).mean())


def values_per_channel(parts: Sequence[Moments]) -> float:
    """Return the least number of values per channel of a part."""
    return min(float(part.count) for part in parts)


def drift(before: Moments, after: Moments) -> tuple[float, float]:
    """Return the drift of mean and of variance, relative to their former values.

        mean over channels of |μ - μ_before| / σ_before
        mean over channels of |σ² - σ²_before| / σ²_before

    Channels without former variance are left out.
    """
    mean = _mean_ratio((after.mean - before.mean).abs(), before.variance.sqrt())
    return mean, _mean_ratio((after.variance - before.variance).abs(), before.variance)


def _mean_ratio(values: Tensor, scales: Tensor) -> float:
    has_scale = scales > 0
    return float((values[has_scale] / scales[has_scale]).mean()) if has_scale.any() else 0.0
