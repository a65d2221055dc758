"""Batch statistics of one rank and of all ranks, and running statistics."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

FAR = 4.0
"""Standard deviations from zero beyond which float32 values of a channel are too inaccurate."""
HEAD = 2
"""Numbers in front of a vector on the wire: the stamp of the call, and the count of values."""
NEVER = 1 << 62
"""Number of the first mispaired call of a device while there is none."""


@dataclass(frozen=True, eq=False)
class LocalStats:
    """Statistics of the values of this rank."""

    count: int
    """Number of values per channel."""
    first: Tensor
    """Σx or mean of each channel; shape (C,), float32 or float64."""
    second: Tensor
    """Σx² or biased variance of each channel; shape (C,)."""
    are_sums: bool
    """Whether these are Σx and Σx², or mean and variance."""

    def per_value(self) -> Tensor:
        """Return mean and second moment per value, shape (2, C), float64."""
        both = torch.stack([self.first, self.second]).to(torch.float64)
        return both / max(self.count, 1) if self.are_sums else both


class Check(NamedTuple):
    """What a collective on a device stream is compared with, on the device."""

    progress: Tensor
    """[number of the first mispaired call, number of the newest complete call]; shape (2,), int64."""
    expected: int
    """Sum of the stamps of all ranks."""
    call: int
    """Number of the call in this process."""


@dataclass(eq=False)
class BatchStats:
    """Count, mean and variance over all ranks, with derived values computed once.

    The count is a Python number if the values are on the CPU, and a tensor where reading it would make the
    host wait for a device, or break a compiled graph.
    """

    vector: Tensor
    """[s, n, mean, variance] of HEAD + 2C elements, float64; n values of all ranks per channel, and s is 0 in
    a recomputation, which must not update running statistics again. C elements follow if the variance between
    ranks is tracked: Σᵢ M2ᵢ over the ranks."""
    moments: Tensor
    """Mean and biased variance, a view of the vector; shape (2, C), float64."""
    mean: Tensor
    """Mean of each channel; shape (C,), float64."""
    variance: Tensor
    """Biased variance of each channel; shape (C,), float64."""
    eps: float
    """Value that is added to the variance."""
    count: Tensor | float
    """Number of values of all ranks per channel."""
    rounded: Tensor | None = None
    """Mean and 1 / √(variance + eps) in the dtype in which a GPU accumulates, shape (2, C)."""
    group: ref[Any] | None = None
    """Process group of the forward pass, which backward must have too; None if this process was alone."""
    _scale: tuple[Tensor | None, Tensor] | None = None

    @classmethod
    def of(
        cls,
        vector: Tensor,
        channels: int,
        eps: float,
        *,
        count: float | None = None,
        rounded: Tensor | None = None,
        group: ref[Any] | None = None,
    ) -> BatchStats:
        """Return the statistics of a vector, whose count is not read unless it is given."""
        moments = vector[HEAD : HEAD + 2 * channels].view(2, channels)
        mean, variance = moments.unbind()
        number = vector[1] if count is None else count
        return cls(vector, moments, mean, variance, eps, number, rounded, group)

    @property
    def within_rank_m2(self) -> Tensor | None:
        """Σᵢ M2ᵢ over the ranks; shape (C,), float64.

        None unless the variance between ranks is tracked.
        """
        size = HEAD + self.moments.numel()
        return self.vector[size:] if self.vector.numel() > size else None

    @property
    def is_new(self) -> Tensor:
        """Whether running statistics do not have these statistics yet; boolean, shape ()."""
        return self.vector[0] != 0

    @functools.cached_property
    def as_float32(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance in float32."""
        mean, variance = self.moments.to(torch.float32).unbind()
        return mean, variance

    @functools.cached_property
    def inverse_as_float32(self) -> Tensor:
        """1 / √(variance + eps) of each channel; shape (C,), float32."""
        return (self.as_float32[1] + self.eps).rsqrt_()

    def scale_by(self, weight: Tensor | None) -> Tensor:
        """Return weight / √(variance + eps), shape (C,), float32.

        Backward takes it from forward.
        """
        if self._scale is None or self._scale[0] is not weight:
            inverse = self.inverse_as_float32
            self._scale = weight, inverse if weight is None else inverse * weight
        return self._scale[1]

    @functools.cached_property
    def inverse(self) -> Tensor:
        """1 / √(variance + eps) of each channel; shape (C,), float64."""
        return (self.variance + self.eps).rsqrt_()

    @functools.cached_property
    def ill_conditioned_channels(self) -> Tensor | None:
        """Indices of channels that float32 represents too inaccurately, on the CPU.

        None if there are none.
        """
        return far_channels(self.mean, self.variance, self.eps)

    def select(self, channels: Tensor) -> BatchStats:
        """Return the statistics of some channels."""
        moments = self.moments[:, channels]
        return BatchStats(self.vector, moments, moments[0], moments[1], self.eps, self.count)


@dataclass(frozen=True, eq=False)
class RunningStats:
    """Running statistics of a layer, updated in place."""

    mean: Tensor
    variance: Tensor
    batches: Tensor
    """Number of batches so far; shape (), int64."""
    momentum: float | None
    """Weight of the newest batch; None gives all batches the same weight."""

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and number of batches."""
        return self.mean, self.variance, self.batches

    @property
    def is_contiguous(self) -> bool:
        """Whether kernels may read and write mean and variance by their addresses."""
        return self.mean.is_contiguous() and self.variance.is_contiguous()

    def update(self, statistics: BatchStats, has_values: Tensor | bool) -> None:
        """Add a batch: running ← running + weight·(statistic - running).

        The variance is the unbiased one. Without new values the weight is 0 and keeps the buffers. A branch
        on a tensor would make the host wait for a device, and break the compiled graph.

        Args:
            statistics: those of the batch.
            has_values: whether it has 2 or more values per channel that were not added before.
        """
        if has_values is False:
            return
        with torch.no_grad():
            self.batches.add_(has_values)
            weight: Tensor | float | None = self.momentum
            if weight is None:
                weight = self.batches.clamp(min=1).to(self.mean.dtype).reciprocal()
            if isinstance(has_values, Tensor):
                weight = has_values.to(self.mean.dtype) * weight
            count = statistics.count
            mean, variance = statistics.mean, statistics.variance
            if self.mean.dtype == torch.float32 and not isinstance(count, Tensor):
                mean, variance = statistics.as_float32
            elif (rounded := statistics.rounded) is not None and rounded.dtype == self.mean.dtype:
                mean = rounded[0]
            degrees = count - 1
            if has_values is not True:
                degrees = at_least_one(degrees)
            unbiased = variance * (count / degrees)
            new = [mean.to(self.mean.dtype), unbiased.to(self.variance.dtype)]
            if isinstance(weight, Tensor):  # the compiler fuses these
                self.mean.lerp_(new[0], weight)
                self.variance.lerp_(new[1], weight)
            else:
                torch._foreach_lerp_([self.mean, self.variance], new, weight)


def far_channels(mean: Tensor, variance: Tensor, eps: float) -> Tensor | None:
    """Return the channels whose mean is more than `FAR` deviations from zero.

    Returns None if there are none.
    """
    excess = torch.addcmul(variance, mean, mean, value=-1 / FAR**2)
    lowest: Any = excess.min().tolist()  # which dispatches less than item()
    if lowest >= -eps:
        return None
    # A NaN propagates through min() to here; its channel compares false and is not selected.
    far = (excess < -eps).nonzero().flatten()
    return far if far.numel() else None


def at_least_one(count: Tensor | float) -> Tensor | float:
    """Return a count to divide by; 1 instead of 0, since 0/0 would be NaN."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)


def new_vector(channels: int, device: torch.device, share: bool) -> Tensor:
    """Return an uninitialised vector for the wire.

    It has HEAD numbers, and two or three per channel.
    """
    return torch.empty(HEAD + (3 if share else 2) * channels, dtype=torch.float64, device=device)
