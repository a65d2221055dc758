"""The passes over a rank's own values on a GPU, by the kernels that torch has for its own SyncBatchNorm.

The formulas are those of `kernels`. Nothing here makes the host wait. The kernels are never given an empty tensor, whose
size they divide by, and always vectors of the dtype that they accumulate in, whatever that of the values.

This has not been run yet: the machine that it was written on has no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 of each channel, in float64, from Welford's one pass."""
    mean, deviation_inverse = torch.batch_norm_stats(x, 0.0)
    # With eps 0 a constant channel has an infinite inverse, and the square of its inverse is 0 again.
    return mean.to(torch.float64), deviation_inverse.to(torch.float64).pow_(-2).mul_(x.numel() // x.shape[1])


def normalise(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return scale·(x - mean) + bias."""
    dtype = _accumulator(x)
    shift = torch.zeros_like(mean) if bias is None else bias
    # The kernel's inverse deviation carries the scale, so that its weight is 1.
    one = torch.ones_like(mean, dtype=dtype)
    return torch.batch_norm_elemt(x, one, shift.to(dtype), mean.to(dtype), scale.to(dtype), 0.0)


def reduce_gradient(dy: Tensor, x: Tensor, mean: Tensor, deviation_inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σdy and Σdy·x̂ of each channel, in float64."""
    dtype = _accumulator(x)
    centre = mean.to(dtype)
    total, product, _, _ = torch.batch_norm_backward_reduce(
        _like(dy, x), x, centre, deviation_inverse.to(dtype), None, True, False, False
    )
    total = total.to(torch.float64)
    # The kernel's centre is the mean rounded; what that lacks is taken off here.
    return total, (product.to(torch.float64) - total * (mean - centre)) * deviation_inverse


def combine_gradient(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return scale·(dy - offset) - factor·(x - mean).

    The kernel computes (dy - s/n - (x - mean)·inverse²·d/n)·inverse·weight; with n = 1 and inverse = 1 its weight is our
    scale, its s our offset, and its d our factor / scale, taken as 0 where the scale is, as factor is 0 there too.
    """
    dtype = _accumulator(x)
    one = torch.ones_like(mean, dtype=dtype)
    product = torch.where(scale != 0, factor / scale, 0.0)
    count = torch.ones(1, dtype=torch.int32, device=x.device)
    return torch.batch_norm_backward_elemt(
        _like(dy, x), x, mean.to(dtype), one, scale.to(dtype), offset.to(dtype), product.to(dtype), count
    )


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Bring a gradient into the memory format of x, beside which the kernels would be slow or refuse it."""
    if dy.stride() == x.stride():
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)
