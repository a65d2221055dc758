"""The passes over a rank's own values: measure, normalise, reduce the gradient, combine it. Pure, and no collective.

On the CPU torch has no kernels for the steps of a synchronised layer. These are made from those it has: its fused
batch normalisation takes the step that is wanted if it is told the rest. They count in float32, so three things are done
in float64 around them: short sums are put together, differences of large numbers are taken, and channels whose mean is
many deviations from zero are done again.

Tensors of three layouts come in, and each pass views them as one of two:

    rows      (N, C, L), contiguous: a channel's values lie side by side
    columns   (M, C), contiguous: a value's channels lie side by side, as in channels_last and in (N, C)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from syncbn import cuda

SMALL = 1 << 13
"""Elements below which a pass in float64 costs less than the calls that a faster one takes."""
CHAIN = 512
"""Values that torch's kernels may add up in float32 one after the other, in columns and in each lane of a row."""
LANES = 16
"""Sums that a vector register takes along a row, side by side."""
FAR = 4.0
"""Standard deviations from zero beyond which float32 does not hold a channel's values well enough to calculate with."""


def reduced_dimensions(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a (N, C, *) tensor that statistics are taken over: all but the channels'."""
    return (0, *range(2, x.dim()))


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """View a (C,) vector so that it broadcasts against a (N, C, *) tensor."""
    return vector.view(1, -1, *(1,) * (x.dim() - 2))


def is_columns(x: Tensor) -> bool:
    """Tell whether a tensor is best seen as columns: its channels lie innermost."""
    return x.dim() == 2 or (x.shape[1] > 1 and x.movedim(1, -1).is_contiguous())


def arrange(x: Tensor, columns: bool) -> Tensor:
    """View a (N, C, *) tensor as columns (M, C) or rows (N, C, L); copy it only where its layout is another."""
    if columns:
        return x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous()
    return x.reshape(x.shape[0], x.shape[1], -1).contiguous()


def rearrange(values: Tensor, x: Tensor, columns: bool) -> Tensor:
    """Give the values of `arrange` the shape of x again."""
    if columns:
        return values.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return values.view(x.shape)


def is_small(x: Tensor) -> bool:
    """Tell whether the plain formula in float64 is the best way: for few values, or on a device without kernels."""
    return x.device.type not in ("cpu", "cuda") or x.numel() < (SMALL if x.device.type == "cpu" else 1)


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 = Σ(x - mean)² of each channel, in float64; zero where there is no value."""
    x = x.detach()
    if is_small(x):
        return _measure_exactly(x)
    if x.is_cuda:
        return cuda.measure(x)
    columns = is_columns(x)
    values = arrange(x, columns)
    if values.dtype.itemsize == 2:
        values = values.to(torch.float32)
    mean, m2, may_be_far = _measure_columns(values) if columns else _measure_rows(values)
    if may_be_far and (far := far_channels(mean, m2 / (x.numel() // x.shape[1]))) is not None:
        mean[far], m2[far] = _measure_exactly(x.index_select(1, far))
    return mean, m2


def _measure_exactly(x: Tensor) -> tuple[Tensor, Tensor]:
    """Measure in two passes of float64, whatever the layout."""
    # The mean of nothing must be 0 like its sum: 0/0 would reach the other ranks as NaN.
    count = max(x.numel() // x.shape[1], 1)
    values = x.to(torch.float64)
    dimensions = reduced_dimensions(x)
    mean = values.sum(dimensions) / count
    return mean, (values - along_channels(mean, x)).square_().sum(dimensions)


def _measure_rows(rows: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Measure by Σx and Σx·(x - K) from one pass around K = 0, and from a second around the mean if that lies far off.

    The third thing returned tells whether it did: more than a deviation.

    Σ(x - mean)² = Σx·(x - K) - Σx·(mean - K), which loses digits only with K's distance from the mean.
    """
    count = rows.shape[0] * rows.shape[2]
    sums, products = _reduce_rows(rows, rows, rows.new_zeros(rows.shape[1]))
    mean = sums / count
    m2 = products.addcmul_(sums, mean, value=-1)
    off = bool((sums * mean > m2).any())
    if off:
        guess = mean.to(rows.dtype)
        sums, products = _reduce_rows(rows, rows, guess)
        mean = sums / count
        m2 = products.addcmul_(sums, mean - guess, value=-1)
    return mean, m2.clamp_(min=0), off


def _reduce_rows(left: Tensor, right: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre) of each channel, of rows that are halved while they are long and even."""
    samples, channels, length = left.shape
    k = 1
    while length // k > CHAIN * LANES and length % (2 * k) == 0:
        k *= 2
    if k == 1:
        return _reduce(left, right, centre)
    halved = (samples, channels * k, length // k)
    total, product = _reduce(left.view(halved), right.view(halved), centre.repeat_interleave(k))
    return total.view(channels, k).sum(1), product.view(channels, k).sum(1)


def _reduce(left: Tensor, right: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre) of each channel: the gradients of bias and weight of a batch norm."""
    one = torch.ones_like(centre)
    _, product, total = torch.ops.aten.native_batch_norm_backward.default(
        left, right, one, None, None, centre, one, True, 0.0, (False, True, True)
    )
    return total.to(torch.float64), product.to(torch.float64)


def _fold(columns: Tensor) -> tuple[Tensor, Tensor, int]:
    """View (M, C) as (M / k, k·C) without copying, and return it, what is left over below, and k.

    torch adds up columns in float32, one value after the other; k columns of M / k values each keep those sums short.
    """
    height = columns.shape[0]
    k = math.ceil(height / CHAIN)
    even = height - height % k
    return columns[:even].view(even // k, k * columns.shape[1]), columns[even:], k


def _measure_columns(columns: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Measure folded columns and put them together as Chan, Golub & LeVeque do for any parts of equal count."""
    folded, rest, k = _fold(columns)
    height, channels = columns.shape
    part = folded.shape[0]
    means, variances = (
        statistic.to(torch.float64).view(k, channels)
        for statistic in torch.batch_norm_update_stats(folded, None, None, 0.0)
    )
    if part * k == height:
        mean = means.mean(0)
        m2 = variances.add_(means.sub_(mean).square_()).sum(0).mul_(part)
    else:
        rest = rest.to(torch.float64)
        mean = (means.sum(0) * part + rest.sum(0)) / height
        m2 = (variances + (means - mean).square_()).sum(0) * part + (rest - mean).square_().sum(0)
    return mean, m2, True


def _reduce_columns(left: Tensor, right: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre) of each channel, as `_reduce_rows` does, of folded columns."""
    folded, rest, k = _fold(left)
    folded_right, rest_right, _ = _fold(right)
    total, product = (sums.view(k, -1).sum(0) for sums in _reduce(folded, folded_right, centre.repeat(k)))
    if rest.numel():
        rest = rest.to(torch.float64)
        total += rest.sum(0)
        product += (rest * (rest_right.to(torch.float64) - centre)).sum(0)
    return total, product


def _scale_and_shift(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale·values + shift in one pass: batch normalisation in evaluation, of mean 0 and variance 1."""
    return torch.native_batch_norm(
        values, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0
    )[0]


def far_channels(mean: Tensor, variance: Tensor) -> Tensor | None:
    """Return the indices of channels that float32 does not hold well enough, or None if there are none."""
    if mean.is_cuda:
        return None  # its kernels subtract the mean first, and to look would make the host wait
    # On the host, which is where the values are. A NaN is far from nothing, and stays.
    far = mean.square() > variance * FAR**2
    return far.nonzero().flatten() if far.any() else None


def normalise(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None, far: Tensor | None) -> Tensor:
    """Return scale·(x - mean) + bias in the dtype and memory format of x.

    Args:
        x: shape (N, C, *).
        mean: shape (C,), float64.
        scale: shape (C,), float64.
        bias: shape (C,), or None for 0.
        far: channels to be calculated in float64, as `far_channels` tells them.
    """
    if is_small(x):
        return _normalise_exactly(x, mean, scale, bias)
    if x.is_cuda:
        return cuda.normalise(x, mean, scale, bias)
    columns = is_columns(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(torch.float64), mean, scale, value=-1)
    values = arrange(x, columns).to(dtype)
    y = rearrange(_scale_and_shift(values, scale.to(dtype), shift.to(dtype)).to(x.dtype), x, columns)
    if far is not None:
        some = None if bias is None else bias[far]
        y.index_copy_(1, far, _normalise_exactly(x.index_select(1, far), mean[far], scale[far], some))
    return y


def _normalise_exactly(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = (x.to(torch.float64) - along_channels(mean, x)).mul_(along_channels(scale, x))
    return (y if bias is None else y.add_(along_channels(bias, x))).to(x.dtype)


def reduce_gradient(dy: Tensor, x: Tensor, mean: Tensor, deviation_inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σdy and Σdy·x̂ of each channel over this rank's values, in float64, with x̂ = (x - mean)·deviation_inverse."""
    if is_small(x):
        dimensions = reduced_dimensions(x)
        dy = dy.to(torch.float64)
        centred = x.to(torch.float64) - along_channels(mean, x)
        return dy.sum(dimensions), centred.mul_(dy).sum(dimensions) * deviation_inverse
    if x.is_cuda:
        return cuda.reduce_gradient(dy, x, mean, deviation_inverse)
    columns = is_columns(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    centre = mean.to(dtype)
    reduce = _reduce_columns if columns else _reduce_rows
    total, product = reduce(arrange(dy, columns).to(dtype), arrange(x, columns).to(dtype), centre)
    # The kernel's centre is the mean rounded; what that lacks is taken off here.
    return total, (product - total * (mean - centre)) * deviation_inverse


def combine_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, factor: Tensor, offset: Tensor, far: Tensor | None
) -> Tensor:
    """Return scale·(dy - offset) - factor·(x - mean) in the dtype and memory format of x.

    Args:
        dy: shape (N, C, *) in any memory format.
        x: shape (N, C, *).
        mean: shape (C,), float64, as are scale, factor and offset.
        scale: see the formula.
        factor: see the formula.
        offset: see the formula.
        far: channels to be calculated in float64, as `far_channels` tells them.
    """
    if is_small(x):
        return _combine_exactly(dy, x, mean, scale, factor, offset)
    if x.is_cuda:
        return cuda.combine_gradient(dy, x, mean, scale, factor, offset)
    columns = is_columns(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shift = (factor * mean - scale * offset).to(dtype)
    dx = _scale_and_shift(arrange(dy, columns).to(dtype), scale.to(dtype), shift)
    values = arrange(x, columns).to(dtype)
    dx.addcmul_(values, along_channels(factor.to(dtype), values), value=-1)
    dx = rearrange(dx.to(x.dtype), x, columns)
    if far is not None:
        some = (dy.index_select(1, far), x.index_select(1, far), mean[far], scale[far], factor[far], offset[far])
        dx.index_copy_(1, far, _combine_exactly(*some))
    return dx


def _combine_exactly(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    dx = (x.to(torch.float64) - along_channels(mean, x)).mul_(along_channels(-factor, x))
    # In place on x, so that dx has the memory format of x whatever that of dy.
    return dx.add_((dy.to(torch.float64) - along_channels(offset, x)).mul_(along_channels(scale, x))).to(x.dtype)
