"""Count, mean and squared deviations per channel, measured and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.kernels.cpu import measure


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of a set of values per channel, in float64 for every input dtype.

    The count is a float64 tensor, which is exact up to 2^53; float16 ends at 65,504. The moments of an empty
    set are zero.
    """

    count: Tensor
    """Number n of values per channel; shape ()."""
    mean: Tensor
    """Mean of each channel; shape (C,)."""
    m2: Tensor
    """M2 = Σ(x - mean)² of each channel; shape (C,)."""

    @property
    def variance(self) -> Tensor:
        """Biased variance M2 / n, used for normalisation; 0 for an empty set."""
        return self.m2 / self.count.clamp(min=1)

    @property
    def unbiased_variance(self) -> Tensor:
        """Unbiased variance M2 / (n - 1) for running statistics; 0 for n < 2."""
        return self.m2 / (self.count - 1).clamp(min=1)

    @classmethod
    def measure(cls, x: Tensor) -> Moments:
        """Return the moments of a tensor: mean = Σx / n and M2 = Σ(x - mean)².

        Args:
            x: floating point, shape (N, C, *); N and any of * may be 0, C may not. The result has no
                gradient.
        """
        count = x.numel() // x.shape[1]
        return cls(torch.full((), count, dtype=torch.float64, device=x.device), *measure(x.detach()))

    @classmethod
    def merge(cls, parts: Sequence[Moments]) -> Moments:
        """Merge the moments of disjoint sets into those of their union.

        Empty sets change nothing.

            n = Σᵢ nᵢ,   mean = Σᵢ nᵢ·meanᵢ / n,   M2 = Σᵢ (M2ᵢ + nᵢ·(meanᵢ - mean)²)

        No term of M2 is negative, so its relative error is that of float64 for means of any magnitude.

        Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", for any number of
        sets.
        """
        counts = torch.stack([part.count for part in parts]).unsqueeze(1)  # (parts, 1) float64
        means = torch.stack([part.mean for part in parts])  # (parts, C) float64
        count = counts.sum()
        mean = (counts * means).sum(0) / count.clamp(min=1)
        within = torch.stack([part.m2 for part in parts]).sum(0)
        between = (counts * (means - mean).square()).sum(0)
        return cls(count, mean, within + between)

    def pack(self) -> Tensor:
        """Return one vector [n, mean, M2] of 2C + 1 elements."""
        return torch.cat([self.count.view(1), self.mean, self.m2])

    @classmethod
    def unpack(cls, vector: Tensor) -> Moments:
        """Return the moments of a vector made by `pack`."""
        mean, m2 = vector[1:].chunk(2)
        return cls(vector[0], mean, m2)
