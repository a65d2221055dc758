"""CPU kernels: measure, normalise, reduce and combine gradients of one rank.

torch has no CPU kernels for the passes of a synchronised layer. For float32 they are composed of its fused
batch normalisation kernels with suitable arguments. These accumulate in float32, so sums are cut into short
ones that are added in float64, and channels whose mean is many deviations from zero are recomputed in
float64.

Small tensors, other dtypes and devices without kernels use the plain formula in float64.

Tensors have one of two layouts, see `layout.arrange`:

    rows      (N, C, *), contiguous: the values of a channel are adjacent
    columns   (M, C), contiguous: the channels of a position are adjacent, as in channels_last and in (N, C)

The means of the gradient are one float64 tensor of shape (2, C): the means of dy and of dy·x̂ over the values
of all ranks, where x̂ = (x - mean) / √(variance + eps).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels.layout import along_channels, reduced_dimensions
from syncbn.kernels.statistics import BatchStats, LocalStats, far_channels

SMALL = 1 << 13
"""Number of elements below which one pass in float64 is faster than the calls of the fused kernels."""
CHAIN = 512
"""Maximum number of values that torch's kernels may add sequentially in float32, in columns and per lane of a
row.
"""
GRADIENT_CHAIN = 1 << 10
"""The same for sums of gradients in columns."""
LANES = 16
"""Parallel sums of a vector register along a row."""
CHUNK = 1 << 17
"""Number of elements converted to float64 at a time, which bounds the additional memory."""


def _is_plain(x: Tensor, statistics: BatchStats | None = None) -> bool:
    """Return whether to use the float64 formula.

    It is also used if many channels are ill-conditioned, which would have to be copied otherwise.
    """
    if x.numel() < SMALL or x.dtype != torch.float32 or not x.is_cpu:
        return True
    if x.dim() > 2 and pieces(x.numel() // (x.shape[0] * x.shape[1])) is None:
        return True  # such as rows of prime length
    return (
        statistics is not None
        and statistics.ill_conditioned_channels is not None
        and 4 * statistics.ill_conditioned_channels.numel() > x.shape[1]
    )


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape along their longest reduced dimension."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        return iter((tensors,))
    dimension = max(reduced_dimensions(first), key=lambda index: first.shape[index])
    length = max(1, CHUNK * first.shape[dimension] // first.numel())
    return zip(*(torch.split(tensor, length, dimension) for tensor in tensors), strict=True)


def _add_up(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2 = Σ(x - mean)² of each channel; zero without values.

    x has shape (N, C, *), the results (C,) in float64, by two passes. Collectives: none.
    """
    # The mean of no values must be 0: 0/0 would reach the other ranks as NaN.
    count = max(x.numel() // x.shape[1], 1)
    dimensions = reduced_dimensions(x)
    mean = _add_up(part.to(torch.float64).sum(dimensions) for (part,) in _chunks(x)) / count
    centre = along_channels(mean, x)
    return mean, _add_up(
        (part.to(torch.float64) - centre).square_().sum(dimensions) for (part,) in _chunks(x)
    )


def measure_local(x: Tensor) -> LocalStats:
    """Return Σx and Σx² of each channel, or mean and variance for float64 values.

    Σx and Σx² are in float64, or in float32 if the variance keeps its digits there. Collectives: none.
    """
    count = x.numel() // x.shape[1]
    if x.dtype == torch.float64:
        mean, m2 = measure(x)
        return LocalStats(count, mean, m2.div_(max(count, 1)), are_sums=False)
    return LocalStats(count, *_measure_sums(x, count), are_sums=True)


def _measure_sums(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if _is_plain(x):
        return _measure_plainly(x)
    columns = x.dim() == 2
    total, squares = _measure_columns(x) if columns else _measure_rows(x)
    # If no mean is more than one deviation from zero, Σx² - Σx·mean subtracts at most half of Σx².
    lowest: Any = torch.addcmul(squares, total, total, value=-2 / count).min().tolist()
    if lowest >= 0:
        return total, squares
    mean, m2 = (_measure_columns_exactly if columns else _measure_rows_around)(x, total / count)
    if (far := far_channels(mean, m2 / count, 0.0)) is not None:
        mean[far], m2[far] = measure(x.index_select(1, far))
    total = mean * count
    return total, m2.addcmul_(total, mean)


def _measure_plainly(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σx and Σx² in float64."""
    dimensions = reduced_dimensions(x)
    total = _add_up(part.sum(dimensions, dtype=torch.float64) for (part,) in _chunks(x))
    return total, _add_up(part.to(torch.float64).square_().sum(dimensions) for (part,) in _chunks(x))


def _measure_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    return _reduce_rows(rows, rows, rows.new_zeros(rows.shape[1]), rows.new_ones(rows.shape[1]))


def _measure_rows_around(rows: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2, computed around a guess of the mean.

    The guess is rounded to float32. From Σx and Σx·(x - guess): Σ(x - mean)² = Σx·(x - guess) - Σx·(mean -
    guess).
    """
    guess = guess.to(torch.float32)
    total, product = (
        sums.to(torch.float64) for sums in _reduce_rows(rows, rows, guess, torch.ones_like(guess))
    )
    mean = total / (rows.numel() // rows.shape[1])
    return mean, product.addcmul_(total, mean - guess, value=-1).clamp_(min=0)


@functools.lru_cache(maxsize=256)
def pieces(length: int) -> int | None:
    """Return the smallest number of equal parts of a row with short sums.

    Returns None if the parts would be tiny.
    """
    longest = CHAIN * LANES
    least = math.ceil(length / longest)
    return next((k for k in range(least, length // LANES + 1) if length % k == 0), None if least > 1 else 1)


def _reduce_rows(left: Tensor, right: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre)·scale of each channel, for rows.

    Long rows are cut into parts.
    """
    samples, channels = left.shape[:2]
    k = pieces(left.numel() // (samples * channels))
    assert k is not None, "rows that cannot be cut use the plain formula"
    if k == 1:
        return _reduce(left, right, centre, scale)
    parts = (samples, channels * k, -1)
    total, product = _reduce(
        left.view(parts), right.view(parts), centre.repeat_interleave(k), scale.repeat_interleave(k)
    )
    return total.to(torch.float64).view(channels, k).sum(1), product.to(torch.float64).view(channels, k).sum(
        1
    )


def _reduce(left: Tensor, right: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre)·scale of each channel.

    These are the gradients of bias and weight of a batch normalisation layer.
    """
    _, product, total = torch.ops.aten.native_batch_norm_backward.default(
        left, right, None, None, None, centre, scale, True, 0.0, (False, True, True)
    )
    return total, product


@functools.lru_cache(maxsize=256)
def _count_parts(height: int, chain: int) -> int:
    """Return the number of parts of at most `chain` rows, without a rest if possible."""
    least = math.ceil(height / chain)
    return next((k for k in range(least, 2 * least) if height % k == 0), least)


def _fold(columns: Tensor, chain: int) -> tuple[Tensor, Tensor | None, int]:
    """View (M, C) as (M / k, k·C); return the view, the remaining rows if any, and k.

    torch adds columns sequentially in float32; k columns of at most `chain` values each keep sums short.
    """
    height, channels = columns.shape
    k = _count_parts(height, chain)
    if k == 1:
        return columns, None, 1
    part, rest = divmod(height, k)
    folded = columns.as_strided((part, k * channels), (k * channels, 1))
    return folded, columns[height - rest :] if rest else None, k


def _measure_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σx and Σx² from mean and variance of folded columns."""
    folded, rest, k = _fold(columns, CHAIN)
    part = folded.shape[0]
    means, variances = torch.batch_norm_update_stats(folded, None, None, 0.0)
    both = torch.stack([means, variances.addcmul_(means, means)]).view(2, k, columns.shape[1])
    total, squares = both.sum(1, dtype=torch.float64).mul_(part).unbind()
    if rest is None:
        return total, squares
    more = _measure_plainly(rest)
    return total.add_(more[0]), squares.add_(more[1])


def _measure_columns_exactly(columns: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and M2, merged from folded columns.

    Source: Chan, Golub & LeVeque 1983, for parts of equal count.
    """
    folded, rest, k = _fold(columns, CHAIN)
    part, channels = folded.shape[0], columns.shape[1]
    means, variances = (
        statistic.to(torch.float64).view(k, channels)
        for statistic in torch.batch_norm_update_stats(folded, None, None, 0.0)
    )
    m2 = variances.add_((means - mean).square_()).sum(0).mul_(part)
    return mean, m2 if rest is None else m2.add_((rest.to(torch.float64) - mean).square_().sum(0))


def _reduce_columns(left: Tensor, right: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σleft and Σleft·(right - centre)·scale of each channel, for columns."""
    (folded, rest, k), (folded_right, rest_right, _) = (_fold(each, GRADIENT_CHAIN) for each in (left, right))
    if k == 1:
        return _reduce(left, right, centre, scale)
    vectors = torch.cat([centre] * k), torch.cat([scale] * k)  # faster than repeat()
    sums = torch.stack(_reduce(folded, folded_right, *vectors))  # (2, k·C)
    total, product = sums.view(2, k, -1).sum(1, dtype=torch.float64).unbind()
    if rest is None or rest_right is None:
        return total, product
    more = _reduce(rest, rest_right, centre, scale)
    return total.add_(more[0]), product.add_(more[1])


def normalise(x: Tensor, statistics: BatchStats, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·x̂ + bias in the dtype of x.

    Args:
        x: rows or columns.
        statistics: statistics over the values of all ranks.
        weight: shape (C,), or None for 1.
        bias: shape (C,), or None for 0.
    """
    if _is_plain(x, statistics):
        return _normalise_plainly(x, statistics, weight, bias)
    mean, variance = statistics.as_float32
    if x.dim() == 2:
        scale = statistics.scale_by(_in_float32(weight))
        bias_32 = _in_float32(bias)
        shift = (mean * scale).neg_() if bias_32 is None else torch.addcmul(bias_32, mean, scale, value=-1)
        y = torch.addcmul(shift, x, scale)
    else:
        y = _evaluate(x, _in_float32(weight), _in_float32(bias), mean, variance, statistics.eps)
    if (far := statistics.ill_conditioned_channels) is not None:
        some = statistics.select(far), _some(weight, far), _some(bias, far)
        y.index_copy_(1, far, _normalise_plainly(x[:, far], *some))
    return y


def _evaluate(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """Return weight·(values - mean) / √(variance + eps) + bias in one pass over rows.

    This is batch normalisation in evaluation.
    """
    return torch.native_batch_norm(values, weight, bias, mean, variance, False, 0.0, eps)[0]


def _in_float32(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.dtype == torch.float32 else vector.to(torch.float32)


def _some(vector: Tensor | None, channels: Tensor) -> Tensor | None:
    return None if vector is None else vector[channels]


def _scale_and_shift(
    statistics: BatchStats, weight: Tensor | None, bias: Tensor | None, *, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the coefficients of y = scale·x + shift; float64, (C,).

    If `centred`, x - mean takes the place of x.
    """
    scale = statistics.inverse if weight is None else statistics.inverse * weight
    if centred:
        return scale, torch.zeros_like(scale) if bias is None else bias
    if bias is None:
        return scale, (statistics.mean * scale).neg_()
    return scale, torch.addcmul(bias, statistics.mean, scale, value=-1)


def _normalise_plainly(
    x: Tensor, statistics: BatchStats, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    # Of float64 values the product with the mean would cost (mean/std) units in the last place.
    centred = x.dtype == torch.float64
    scale, shift = (
        along_channels(vector, x) for vector in _scale_and_shift(statistics, weight, bias, centred=centred)
    )
    y = torch.empty_like(x)
    for part, result in _chunks(x, y):
        values = part - along_channels(statistics.mean, x) if centred else part
        torch.addcmul(shift, values, scale, out=result)
    return y


def reduce_gradient(dy: Tensor, x: Tensor, statistics: BatchStats) -> tuple[Tensor, Tensor]:
    """Return Σdy and Σdy·x̂ of each channel over this rank's values, shape (C,).

    They are in float64, or in float32 for float32 values. Collectives: none.
    """
    if _is_plain(x, statistics):
        return _reduce_plainly(dy, x, statistics)
    reduce = _reduce_columns if x.dim() == 2 else _reduce_rows
    mean, inverse = statistics.as_float32[0], statistics.inverse_as_float32
    total, product = reduce(dy, x, mean, inverse)
    if (far := statistics.ill_conditioned_channels) is not None:
        # Rounding their mean to float32 is an error of a considerable part of a deviation.
        product[far] = _reduce_plainly(dy[:, far], x[:, far], statistics.select(far))[1].to(product.dtype)
    return total, product


def _reduce_plainly(dy: Tensor, x: Tensor, statistics: BatchStats) -> tuple[Tensor, Tensor]:
    dimensions, centred = reduced_dimensions(x), x.dtype == torch.float64
    mean = along_channels(statistics.mean, x)
    total = _add_up(part.sum(dimensions, dtype=torch.float64) for (part,) in _chunks(dy))
    product = _add_up(
        ((part - mean) if centred else part).mul(dy_part.to(torch.float64)).sum(dimensions)
        for part, dy_part in _chunks(x, dy)
    )
    if not centred:
        product = torch.addcmul(product, total, statistics.mean, value=-1)
    return total, product.mul_(statistics.inverse)


def combine_gradient(
    dy: Tensor, x: Tensor, statistics: BatchStats, weight: Tensor | None, gradient_means: Tensor
) -> Tensor:
    """Return weight / √(variance + eps)·(dy - mean of dy - x̂·mean of dy·x̂).

    The result has the dtype of x. Collectives: none.

    Args:
        dy: shape of x.
        x: rows or columns.
        statistics: statistics over the values of all ranks.
        weight: shape (C,), or None for 1.
        gradient_means: shape (2, C), float64.
    """
    if _is_plain(x, statistics):
        return _combine_plainly(dy, x, statistics, weight, gradient_means)
    mean, variance = statistics.as_float32
    mean_dy, mean_dy_normalised = gradient_means.to(torch.float32).unbind()  # (C,), (C,)
    weight_32 = _in_float32(weight)
    if x.dim() == 2:
        # dx = scale·dy - factor·x + factor·mean - scale·mean of dy
        scale = statistics.scale_by(weight_32)
        factor = (scale * statistics.inverse_as_float32).mul_(mean_dy_normalised)
        shift = (factor * mean).addcmul_(scale, mean_dy, value=-1)
        dx = torch.addcmul(shift, x, factor, value=-1).addcmul_(dy, scale)
    else:
        factor = mean_dy_normalised / (variance + statistics.eps)
        if weight_32 is not None:
            factor *= weight_32
        # dx = weight·(dy - mean of dy)·(variance + eps)^-½ + factor·mean - factor·x; the fused pass computes
        # the first two terms.
        dx = _evaluate(dy, weight_32, factor * mean, mean_dy, variance, statistics.eps)
        dx.addcmul_(x, along_channels(factor, x), value=-1)
    if (far := statistics.ill_conditioned_channels) is not None:
        some = statistics.select(far), _some(weight, far), gradient_means[:, far]
        dx.index_copy_(1, far, _combine_plainly(dy[:, far], x[:, far], *some))
    return dx


def _gradient_coefficients(
    statistics: BatchStats, weight: Tensor | None, gradient_means: Tensor, *, centred: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficients of dx = scale·dy + factor·x + shift; float64, (C,).

    If `centred`, x - mean takes the place of x.
    """
    scale = statistics.inverse if weight is None else statistics.inverse * weight
    shift, factor = gradient_means.mul(scale).neg_().unbind()
    factor.mul_(statistics.inverse)
    return scale, factor, shift if centred else shift.addcmul_(factor, statistics.mean, value=-1)


def _combine_plainly(
    dy: Tensor, x: Tensor, statistics: BatchStats, weight: Tensor | None, gradient_means: Tensor
) -> Tensor:
    centred = x.dtype == torch.float64
    coefficients = _gradient_coefficients(statistics, weight, gradient_means, centred=centred)
    scale, factor, shift = (along_channels(vector, x) for vector in coefficients)
    dx = torch.empty_like(x)
    for part, dy_part, result in _chunks(x, dy, dx):
        values = part - along_channels(statistics.mean, x) if centred else part
        torch.addcmul(torch.addcmul(shift, values, factor), dy_part, scale, out=result)
    return dx
