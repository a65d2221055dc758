"""Batch statistics over all ranks, for the passes and the module."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 4.0
"""Standard deviations from zero beyond which float32 does not hold a channel's values well enough to calculate with."""


@dataclass(frozen=True, eq=False)
class BatchStats:
    """Count, mean and variance of all ranks' values, with what follows from them, computed once.

    Numbers are Python's where the values lie on the CPU, and tensors where reading them would make the host wait for a
    device, or make the compiler give up.
    """

    count: Tensor | float
    """Values of all ranks in each channel."""
    update_count: Tensor | float
    """The count again, or 0 in a recomputation, whose statistics no running average shall see twice."""
    moments: Tensor
    """Mean and biased variance, shape (2, C), float64."""
    within_rank_m2: Tensor | None
    """Σᵢ M2ᵢ over the ranks, shape (C,), float64, where the share of the variance between ranks is wanted."""
    eps: float
    """Added to the variance."""
    ranks: int = 1
    """Ranks that the values are from, over which backward must be too."""

    @property
    def mean(self) -> Tensor:
        """Mean of each channel; shape (C,), float64."""
        return self.moments[0]

    @property
    def variance(self) -> Tensor:
        """Biased variance of each channel; shape (C,), float64."""
        return self.moments[1]

    @functools.cached_property
    def as_float32(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance in float32."""
        mean, variance = self.moments.to(torch.float32).unbind()
        return mean, variance

    @functools.cached_property
    def ill_conditioned_channels(self) -> Tensor | None:
        """Indices of the channels that float32 does not hold well enough, or None if there are none; on the CPU."""
        return far_channels(self.mean, self.variance, self.eps)

    def select(self, channels: Tensor) -> BatchStats:
        """Return the statistics of some channels."""
        return BatchStats(self.count, self.update_count, self.moments[:, channels], None, self.eps)

    def pack(self) -> Tensor:
        """Return one vector [n, news, mean, variance] of 2C + 2 elements, and C more if `within_rank_m2` is there."""
        numbers = torch.stack(
            [torch.as_tensor(number, dtype=torch.float64) for number in (self.count, self.update_count)]
        )
        parts = [numbers.to(self.moments.device), self.moments.flatten()]
        return torch.cat(parts if self.within_rank_m2 is None else [*parts, self.within_rank_m2])

    @classmethod
    def unpack(cls, vector: Tensor, channels: int, eps: float, read: bool, ranks: int = 1) -> BatchStats:
        """Return the statistics that `pack` made a vector of, with the numbers read from it or as tensors; `ranks` is not in it."""
        count, update_count = vector[:2].tolist() if read else vector[:2].unbind()
        moments, within_rank_m2 = vector[2 : 2 * channels + 2].view(2, channels), vector[2 * channels + 2 :]
        return cls(count, update_count, moments, within_rank_m2 if within_rank_m2.numel() else None, eps, ranks)


def far_channels(mean: Tensor, variance: Tensor, eps: float) -> Tensor | None:
    """Return the indices of channels whose mean is more than `FAR` deviations off zero, or None if there are none."""
    excess = torch.addcmul(variance, mean, mean, value=-1 / FAR**2)
    if excess.min().item() >= -eps:
        return None
    # A NaN, which is the least of all, is far from nothing, and stays.
    far = (excess < -eps).nonzero().flatten()
    return far if far.numel() else None


def at_least_one(count: Tensor | float) -> Tensor | float:
    """Return a count to divide by: where no rank has a value there is nothing to divide, and 0/0 would be NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
