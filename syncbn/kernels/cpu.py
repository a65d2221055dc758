"""CPU kernels: measure, normalise, reduce and combine gradients of one rank.

On the CPU torch has no kernels for the steps of a synchronised layer. For float32 these are made from those it has: its
fused batch normalisation performs the step for suitable arguments. They count in float32, so short sums are
put together in float64, and channels whose mean is many deviations from zero are done again in float64.

What is small, of another dtype or on a device without kernels is calculated by the plain formula in float64.

Float32 tensors of three layouts come in, and each pass views them as one of two:

    rows      (N, C, *), contiguous: a channel's values lie side by side
    columns   (M, C), contiguous: a value's channels lie side by side, as in channels_last and in (N, C)

The means of the gradient are passed as one float64 tensor of shape (2, C): those of dy and of dy·x̂ over all ranks' values,
where x̂ = (x - mean) / √(variance + eps).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from syncbn.kernels import cuda
from syncbn.kernels.statistics import BatchStats, far_channels

SMALL = 1 << 13
"""Elements below which a pass in float64 costs less than the calls that a faster one takes."""
CHAIN = 512
"""Values that torch's kernels may add up in float32 one after the other, in columns and in each lane of a row."""
LANES = 16
"""Sums that a vector register takes along a row, side by side."""
CHUNK = 1 << 17
"""Elements that are in float64 at a time: copies of this size, and not of a whole tensor's, are all the memory it takes."""


def reduced_dimensions(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a (N, C, *) tensor that statistics are taken over: all but the channels'."""
    return (0, *range(2, x.dim()))


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """View a (C,) vector so that it broadcasts against a (N, C, *) tensor."""
    return vector.view(1, -1, *(1,) * (x.dim() - 2))


def is_columns(x: Tensor) -> bool:
    """Return whether a tensor is best processed as columns: its channels are the innermost dimension."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]
    return x.shape[1] > 1 and x.movedim(1, -1).is_contiguous()


def arrange(x: Tensor, columns: bool) -> Tensor:
    """Return the values as columns or rows, copied only where their layout is another."""
    return x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous() if columns else x.contiguous()


def rearrange(values: Tensor, x: Tensor, columns: bool) -> Tensor:
    """Give the values of `arrange` the shape of x again."""
    return values.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1) if columns else values


def _is_native(x: Tensor) -> bool:
    """Return whether torch has kernels for the passes of a synchronised layer."""
    return x.is_cuda


def _is_plain(x: Tensor, statistics: BatchStats | None = None) -> bool:
    """Return whether to use the float64 formula, also where many channels are ill-conditioned, which would be copied otherwise."""
    if _is_native(x):
        return x.numel() == 0
    if x.numel() < SMALL or x.dtype != torch.float32 or not x.is_cpu:
        return True
    if not is_columns(x) and pieces(x.numel() // (x.shape[0] * x.shape[1])) is None:
        return True  # rows of a prime length, say
    return (
        statistics is not None
        and statistics.ill_conditioned_channels is not None
        and 4 * statistics.ill_conditioned_channels.numel() > x.shape[1]
    )


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape across the longest of the dimensions that statistics are taken over."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        return iter((tensors,))
    dimension = max(reduced_dimensions(first), key=lambda index: first.shape[index])
    length = max(1, CHUNK * first.shape[dimension] // first.numel())
    return zip(*(torch.split(tensor, length, dimension) for tensor in tensors), strict=True)


def _add_up(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 = Σ(x - mean)² of each channel, by two passes in float64; zero where there is no value."""
    # The mean of nothing must be 0 like its sum: 0/0 would reach the other ranks as NaN.
    count = max(x.numel() // x.shape[1], 1)
    dimensions = reduced_dimensions(x)
    mean = _add_up(part.to(torch.float64).sum(dimensions) for (part,) in _chunks(x)) / count
    centre = along_channels(mean, x)
    return mean, _add_up((part.to(torch.float64) - centre).square_().sum(dimensions) for (part,) in _chunks(x))


def measure_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σx and Σx² of each channel, in float64, or in float32 where the variance keeps its digits in that."""
    count = x.numel() // x.shape[1]
    if _is_plain(x):
        mean, m2 = measure(x)
    elif _is_native(x):
        mean, m2 = cuda.measure(x)
    else:
        columns = is_columns(x)
        values = arrange(x, columns)
        if columns:
            mean, m2 = _measure_columns(values)
        else:
            zero, one = values.new_zeros(x.shape[1]), values.new_ones(x.shape[1])
            total, squares = _reduce_rows(values, values, zero, one)
            # Σx² - Σx·mean subtracts from the first at most half of it if no mean is more than a deviation off zero.
            if torch.addcmul(squares, total, total, value=-2 / count).min().item() >= 0:
                return total, squares
            mean, m2 = _measure_rows_around(values, (total / count).to(torch.float32))
        if (far := far_channels(mean, m2 / count, 0.0)) is not None:
            mean[far], m2[far] = measure(x.index_select(1, far))
    total = mean * count
    return total, m2.addcmul_(total, mean)


def _measure_rows_around(rows: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 by Σx and Σx·(x - guess): Σ(x - mean)² = Σx·(x - guess) - Σx·(mean - guess)."""
    total, product = (sums.to(torch.float64) for sums in _reduce_rows(rows, rows, guess, torch.ones_like(guess)))
    mean = total / (rows.numel() // rows.shape[1])
    return mean, product.addcmul_(total, mean - guess, value=-1).clamp_(min=0)


@functools.lru_cache(maxsize=256)
def pieces(length: int) -> int | None:
    """Return the least number of equal parts that a row is cut into for short sums; None if they would be tiny."""
    longest = CHAIN * LANES
    least = math.ceil(length / longest)
    return next((k for k in range(least, length // LANES + 1) if length % k == 0), None if least > 1 else 1)


def _reduce_rows(left: Tensor, right: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre)·scale of each channel, of rows that are cut while they are long."""
    samples, channels = left.shape[:2]
    k = pieces(left.numel() // (samples * channels))
    assert k is not None, "rows that cannot be cut are calculated plainly"
    if k == 1:
        return _reduce(left, right, centre, scale)
    parts = (samples, channels * k, -1)
    total, product = _reduce(
        left.view(parts), right.view(parts), centre.repeat_interleave(k), scale.repeat_interleave(k)
    )
    return total.to(torch.float64).view(channels, k).sum(1), product.to(torch.float64).view(channels, k).sum(1)


def _reduce(left: Tensor, right: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre)·scale of each channel: the gradients of bias and weight of a batch norm."""
    _, product, total = torch.ops.aten.native_batch_norm_backward.default(
        left, right, None, None, None, centre, scale, True, 0.0, (False, True, True)
    )
    return total, product


def _fold(columns: Tensor) -> tuple[Tensor, Tensor, int]:
    """View (M, C) as (M / k, k·C) without copying, and return it, what is left over below, and k.

    torch adds up columns in float32, one value after the other; k columns of M / k values each keep those sums short.
    """
    height = columns.shape[0]
    k = math.ceil(height / CHAIN)
    even = height - height % k
    return columns[:even].view(even // k, k * columns.shape[1]), columns[even:], k


def _measure_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
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
        return mean, variances.add_(means.sub_(mean).square_()).sum(0).mul_(part)
    rest = rest.to(torch.float64)
    mean = (means.sum(0) * part + rest.sum(0)) / height
    return mean, (variances + (means - mean).square_()).sum(0) * part + (rest - mean).square_().sum(0)


def _reduce_columns(left: Tensor, right: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre)·scale of each channel, as `_reduce_rows` does, of folded columns."""
    folded, rest, k = _fold(left)
    if k == 1:
        return _reduce(left, right, centre, scale)
    folded_right, rest_right, _ = _fold(right)
    reduced = _reduce(folded, folded_right, centre.repeat(k), scale.repeat(k))
    total, product = (sums.to(torch.float64).view(k, -1).sum(0) for sums in reduced)
    if rest.numel():
        rest = rest.to(torch.float64)
        total += rest.sum(0)
        product += (rest * (rest_right.to(torch.float64) - centre)).sum(0) * scale
    return total, product


def normalise(x: Tensor, statistics: BatchStats, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·x̂ + bias in the dtype and memory format of x.

    Args:
        x: shape (N, C, *).
        statistics: of all ranks' values.
        weight: shape (C,), or None for 1.
        bias: shape (C,), or None for 0.
    """
    if _is_plain(x, statistics):
        return _normalise_plainly(x, statistics, weight, bias)
    if _is_native(x):
        return cuda.normalise(x, statistics, weight, bias)
    columns = is_columns(x)
    mean, variance = statistics.as_float32
    values = arrange(x, columns)
    y = rearrange(_evaluate(values, _rounded(weight), _rounded(bias), mean, variance, statistics.eps), x, columns)
    if (far := statistics.ill_conditioned_channels) is not None:
        some = statistics.select(far), _some(weight, far), _some(bias, far)
        y.index_copy_(1, far, _normalise_plainly(x[:, far], *some))
    return y


def _evaluate(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """Return weight·(values - mean) / √(variance + eps) + bias in one pass: batch normalisation in evaluation."""
    return torch.native_batch_norm(values, weight, bias, mean, variance, False, 0.0, eps)[0]


def _rounded(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.dtype == torch.float32 else vector.to(torch.float32)


def _some(vector: Tensor | None, channels: Tensor) -> Tensor | None:
    return None if vector is None else vector[channels]


def _inverse(statistics: BatchStats) -> Tensor:
    """Return 1 / √(variance + eps)."""
    return (statistics.variance + statistics.eps).rsqrt_()


def _normalise_plainly(x: Tensor, statistics: BatchStats, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scale = _inverse(statistics)
    if weight is not None:
        scale = scale.mul_(weight)
    centre, factor = along_channels(statistics.mean, x), along_channels(scale, x)
    y = torch.empty_like(x)
    for part, result in _chunks(x, y):
        values = (part.to(torch.float64) - centre).mul_(factor)
        result.copy_(values if bias is None else values.add_(along_channels(bias, x)))
    return y


def reduce_gradient(dy: Tensor, x: Tensor, statistics: BatchStats) -> tuple[Tensor, Tensor]:
    """Return Σdy and Σdy·x̂ of each channel over this rank's values, in float64, or in float32 from such values."""
    if _is_plain(x, statistics):
        return _reduce_plainly(dy, x, statistics)
    if _is_native(x):
        return cuda.reduce_gradient(dy, x, statistics)
    columns = is_columns(x)
    reduce = _reduce_columns if columns else _reduce_rows
    mean, variance = statistics.as_float32
    inverse = (variance + statistics.eps).rsqrt_()
    total, product = reduce(arrange(dy, columns), arrange(x, columns), mean, inverse)
    if (far := statistics.ill_conditioned_channels) is not None:
        # Their mean, rounded to float32 as the kernel takes it, is off by a part of a deviation that counts.
        product[far] = _reduce_plainly(dy[:, far], x[:, far], statistics.select(far))[1].to(product.dtype)
    return total, product


def _reduce_plainly(dy: Tensor, x: Tensor, statistics: BatchStats) -> tuple[Tensor, Tensor]:
    dimensions = reduced_dimensions(x)
    centre = along_channels(statistics.mean, x)
    total = _add_up(part.to(torch.float64).sum(dimensions) for (part,) in _chunks(dy))
    product = _add_up(
        (part.to(torch.float64) - centre).mul_(dy_part).sum(dimensions) for part, dy_part in _chunks(x, dy)
    )
    return total, product.mul_(_inverse(statistics))


def combine_gradient(
    dy: Tensor, x: Tensor, statistics: BatchStats, weight: Tensor | None, gradient_means: Tensor
) -> Tensor:
    """Return weight / √(variance + eps)·(dy - mean of dy - x̂·mean of dy·x̂) in the dtype and memory format of x.

    Args:
        dy: shape (N, C, *) in any memory format.
        x: shape (N, C, *).
        statistics: of all ranks' values.
        weight: shape (C,), or None for 1.
        gradient_means: shape (2, C), float64.
    """
    if _is_plain(x, statistics):
        return _combine_plainly(dy, x, statistics, weight, gradient_means)
    if _is_native(x):
        return cuda.combine_gradient(dy, x, statistics, weight, gradient_means)
    columns = is_columns(x)
    mean, variance = statistics.as_float32
    mean_dy, mean_dy_normalised = gradient_means.to(torch.float32).unbind()
    scale = _rounded(weight)
    factor = mean_dy_normalised / (variance + statistics.eps)
    if scale is not None:
        factor *= scale
    # dx = scale·(dy - mean of dy)·(variance + eps)^-½ + factor·mean - factor·x, the first two terms in one fused pass.
    dx = _evaluate(arrange(dy, columns), scale, factor * mean, mean_dy, variance, statistics.eps)
    values = arrange(x, columns)
    dx = rearrange(dx.addcmul_(values, along_channels(factor, values), value=-1), x, columns)
    if (far := statistics.ill_conditioned_channels) is not None:
        some = statistics.select(far), _some(weight, far), gradient_means[:, far]
        dx.index_copy_(1, far, _combine_plainly(dy[:, far], x[:, far], *some))
    return dx


def _combine_plainly(
    dy: Tensor, x: Tensor, statistics: BatchStats, weight: Tensor | None, gradient_means: Tensor
) -> Tensor:
    mean_dy, mean_dy_normalised = gradient_means.unbind()
    inverse = _inverse(statistics)
    scale = along_channels(inverse if weight is None else inverse * weight, x)
    factor = along_channels(mean_dy_normalised.mul(inverse).neg_(), x)
    centre, offset = along_channels(statistics.mean, x), along_channels(mean_dy, x)
    dx = torch.empty_like(x)
    for part, dy_part, result in _chunks(x, dy, dx):
        values = (part.to(torch.float64) - centre).mul_(factor)
        result.copy_(values.add_(dy_part).sub_(offset).mul_(scale))
    return dx
