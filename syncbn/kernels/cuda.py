"""CUDA kernels: the native ones of torch's SyncBatchNorm.

The formulas are those of `kernels`. Nothing here makes the host wait. The kernels are never given an empty tensor, whose
size they divide by, and always vectors of the dtype that they accumulate in, whatever that of the values.

This has not been run yet: the machine that it was written on has no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.kernels.statistics import BatchStats


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 of each channel, in float64, from Welford's one pass."""
    # Not batch_norm_stats, whose inverse deviation is 0 for a constant channel, like that of an infinite variance.
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean.to(torch.float64), variance.to(torch.float64).mul_(x.numel() // x.shape[1])


def normalise(x: Tensor, statistics: BatchStats, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·(x - mean) / √(variance + eps) + bias."""
    mean, variance, eps = statistics.mean, statistics.variance, statistics.eps
    dtype = _accumulator(x)
    weight, bias = (None if vector is None else vector.to(dtype) for vector in (weight, bias))
    return torch.batch_norm_elemt(x, weight, bias, mean.to(dtype), _inverse(variance, eps).to(dtype), eps)


def reduce_gradient(dy: Tensor, x: Tensor, statistics: BatchStats) -> tuple[Tensor, Tensor]:
    """Return Σdy and Σdy·x̂ of each channel, in float64."""
    mean, variance, eps = statistics.mean, statistics.variance, statistics.eps
    dtype = _accumulator(x)
    centre = mean.to(dtype)
    inverse = _inverse(variance, eps)
    # The kernel's first result is Σdy, its second Σdy·(x - centre).
    total, product, _, _ = torch.batch_norm_backward_reduce(
        _like(dy, x), x, centre, inverse.to(dtype), None, True, False, False
    )
    total = total.to(torch.float64)
    # The kernel's centre is the mean rounded; what that lacks is taken off here.
    return total, (product.to(torch.float64) - total * (mean - centre)) * inverse


def combine_gradient(
    dy: Tensor, x: Tensor, statistics: BatchStats, weight: Tensor | None, gradient_means: Tensor
) -> Tensor:
    """Return weight / √(variance + eps)·(dy - mean of dy - x̂·mean of dy·x̂).

    The kernel takes Σdy and Σdy·(x - mean) and divides them by a count; it is given their means, and the count 1.
    """
    mean, variance, eps = statistics.mean, statistics.variance, statistics.eps
    mean_dy, mean_dy_normalised = gradient_means
    dtype = _accumulator(x)
    product = mean_dy_normalised * (variance + eps).sqrt()
    count = torch.ones(1, dtype=torch.int32, device=x.device)
    return torch.batch_norm_backward_elemt(
        _like(dy, x),
        x,
        mean.to(dtype),
        _inverse(variance, eps).to(dtype),
        None if weight is None else weight.to(dtype),
        mean_dy.to(dtype),
        product.to(dtype),
        count,
    )


def _inverse(variance: Tensor, eps: float) -> Tensor:
    return (variance + eps).rsqrt()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Bring a gradient into the memory format of x, beside which the kernels would be slow or refuse it."""
    if dy.stride() == x.stride():
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)
