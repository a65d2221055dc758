"""Forward and backward passes with their collectives; custom operators.

In eager mode `SyncBatchNormFunction` calls `forward` and `backward` directly. The compiler must not trace them, since they wait for
other ranks and read values; for the compiler they are the operators syncbn::forward and syncbn::backward, which run the same code.
A compiled layer issues the same collectives and computes the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.reduce import gather_from_ranks, group_size, sum_over_ranks
from syncbn.errors import InputError
from syncbn.kernels import cpu as kernels
from syncbn.kernels.statistics import BatchStats, at_least_one
from syncbn.moments import Moments


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    site: LayerCollectives,
    mask: Tensor | None = None,
) -> tuple[Tensor, BatchStats]:
    """Normalise by the statistics of all ranks, differentiably; `sync_batch_norm` has the formulas.

    `mask` is boolean with the shape of x without channels. Values where it is False are ignored and become 0.
    """
    if torch.compiler.is_compiling():
        # The setting is an argument, so that the compiler guards on it.
        output, totals = _NormaliseCompiled.apply(x, mask, weight, bias, eps, site.key, site.share_wanted)
        return output, BatchStats.unpack(totals, x.shape[1], eps, read=False)
    output, statistics = SyncBatchNormFunction.apply(x, mask, weight, bias, eps, site, torch.is_grad_enabled())
    return output, statistics


def moments_of(statistics: BatchStats) -> Moments:
    """Return count, mean and M2."""
    count = torch.as_tensor(statistics.count, dtype=torch.float64, device=statistics.moments.device)
    return Moments(count, statistics.mean, statistics.variance * count)


class SyncBatchNormFunction(Function):
    """Autograd function in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        site: LayerCollectives,
        with_graph: bool,
    ) -> tuple[Tensor, BatchStats]:
        """See `forward` of this module."""
        keep_record = not (with_graph and any(ctx.needs_input_grad))
        y, statistics = forward(x, mask, weight, bias, eps, site, keep_record)
        # The layer may be deleted before backward, which needs its collectives; and a checkpoint may recompute this pass while
        # the graph exists.
        ctx.site, ctx.statistics, ctx.record = site, statistics, site.newest
        ctx.save_for_backward(x, mask, weight)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The passes return views, and autograd does not allow in-place changes of an output that is a view.
        return y.data, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """See `backward` of this module."""
        x, mask, weight = ctx.saved_tensors
        differentiate = _differentiable_gradients if torch.is_grad_enabled() else backward
        gradients = differentiate(torch.zeros_like(x) if dy is None else dy, x, mask, weight, ctx.statistics, ctx.site)
        return _wanted(ctx, weight, *gradients)


class _NormaliseCompiled(Function):
    """Autograd function under torch.compile."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        key: Tensor,
        share: bool,
    ) -> tuple[Tensor, Tensor]:
        y, totals = torch.ops.syncbn.forward(x, mask, weight, bias, eps, key, share)
        ctx.save_for_backward(x, mask, weight, totals, key)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps = eps
        return y, totals

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, mask, weight, totals, key = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        return _wanted(ctx, weight, *torch.ops.syncbn.backward(dy, x, mask, weight, totals, ctx.eps, key))


def _wanted(
    ctx: Any, weight: Tensor | None, dx: Tensor, weight_gradient: Tensor, bias_gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the requested gradients in the order of forward's arguments and in the dtypes of the parameters."""
    return (
        dx if ctx.needs_input_grad[0] else None,
        None,
        weight_gradient.to(weight.dtype) if weight is not None and ctx.needs_input_grad[2] else None,
        bias_gradient.to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None,
        None,
        None,
        None,
    )


def select(x: Tensor, mask: Tensor) -> Tensor:
    """Return the values selected by the mask, shape (n, C). n may differ between ranks and may be 0."""
    return x.movedim(1, -1)[mask]


def put_back(values: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Return selected values in the shape and memory format of x, with 0 elsewhere."""
    positions = x.movedim(1, -1)
    return torch.zeros_like(positions).index_put((mask,), values).movedim(-1, 1)


def forward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    site: LayerCollectives,
    keep_record: bool,
) -> tuple[Tensor, BatchStats]:
    """Measure the values of this rank, exchange statistics, normalise."""
    if mask is not None:
        y, statistics = forward(select(x, mask), None, weight, bias, eps, site, keep_record)
        return put_back(y, mask, x), statistics
    statistics = _exchange_moments(x, eps, site, keep_record)
    return kernels.normalise(x, statistics, weight, bias), statistics


def _exchange_moments(x: Tensor, eps: float, site: LayerCollectives, keep_record: bool) -> BatchStats:
    """Measure x and merge with the other ranks by one collective; with one rank there is none."""
    count = x.numel() // x.shape[1]
    # Branches depend only on group size, dtype and settings of the layer, which are equal on every rank, and not on the number
    # of values or requires_grad. A recomputation happens on every rank. So every rank reaches the collective.
    in_float64 = x.dtype == torch.float64
    sums = kernels.measure(x) if in_float64 else kernels.measure_sums(x)
    if (recalled := site.lookup(x, sums)) is not None:
        return replace(recalled, update_count=0.0)
    exchange = _exchange_parts if in_float64 else _exchange_sums
    statistics = replace(exchange(count, *sums, eps, site), ranks=group_size(site.process_group))
    site.ranks = statistics.ranks
    # If the total is 1, no rank has more than 1 value, so every rank reads the total and all raise together. A rank with more
    # values does not read it, since that would make the host wait for the device.
    if count <= 1 and statistics.count == 1:
        raise InputError(
            "input: all ranks together must have 2 or more values per channel in training "
            f"(got 1; shape {tuple(x.shape)} on this rank)"
        )
    site.store(x, sums, statistics, keep_record)
    return statistics


def _exchange_sums(count: int, total: Tensor, squares: Tensor, eps: float, site: LayerCollectives) -> BatchStats:
    """Sum [n, Σx, Σx²] over the ranks: mean = Σx / n, variance = Σx² / n - mean².

    The subtraction has an error of about 2^-52·mean², below the resolution of float32 values.
    """
    parts = [total, squares]
    if site.share_wanted:
        parts.append(squares.to(torch.float64).addcmul(total.to(torch.float64), total, value=-1 / max(count, 1)))
    (everyone,), sums = sum_over_ranks([count], parts, site, "forward")
    channels = len(total)
    moments = sums[: 2 * channels].view(2, channels).div_(at_least_one(everyone))
    mean, variance = moments.unbind()
    # Rounding can make the variance of a constant channel negative, and its square root NaN.
    variance.addcmul_(mean, mean, value=-1).clamp_(min=0)
    return BatchStats(everyone, everyone, moments, sums[2 * channels :] if site.share_wanted else None, eps)


def _exchange_parts(count: int, mean: Tensor, m2: Tensor, eps: float, site: LayerCollectives) -> BatchStats:
    """Gather [n, mean, M2] of the ranks and merge them.

    Adding and subtracting n·mean² would cost float64 values (mean/std)² units in the last place. A shift by a shared value would
    avoid this, but no value is known to be shared before the first collective: the running mean starts at 0, and ranks that
    have loaded different buffers would produce a silent error.
    """
    # A separate phase, so that ranks with different dtypes get a DesyncError.
    gathered = gather_from_ranks([count], [mean, m2], site, "forward in float64")
    parts = [Moments.unpack(part) for part in gathered]
    merged = Moments.merge(parts)
    within = torch.stack([part.m2 for part in parts]).sum(0) if site.share_wanted else None
    everyone = merged.count if merged.count.is_cuda else merged.count.item()
    return BatchStats(everyone, everyone, torch.stack([merged.mean, merged.variance]), within, eps)


def backward(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, statistics: BatchStats, site: LayerCollectives
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, the latter two in the accumulation dtype."""
    if mask is not None:
        dx, weight_gradient, bias_gradient = backward(select(dy, mask), select(x, mask), None, weight, statistics, site)
        return put_back(dx, mask, x), weight_gradient, bias_gradient
    bias_gradient, weight_gradient = kernels.reduce_gradient(dy, x, statistics)
    # A rank that is empty or needs no gradient of x still adds its sums, which are part of the dx of other ranks.
    # The zero makes the vector as long as that of forward, so that both share a channel, and a rank that skipped a layer is
    # detected by its stamp on backends without channels.
    _, sums = sum_over_ranks([0], [bias_gradient, weight_gradient], site, "backward", statistics.ranks)
    gradient_means = sums.view(2, x.shape[1]).div_(at_least_one(statistics.count))
    dx = kernels.combine_gradient(dy, x, statistics, weight, gradient_means)
    return dx, weight_gradient, bias_gradient


class _SumOverRanks(Function):
    """Sum of a vector over the ranks, differentiable any number of times; a known sum is not exchanged again."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, site: LayerCollectives, ranks: int, known: Tensor | None) -> Tensor:
        ctx.site, ctx.ranks = site, ranks
        return sum_over_ranks([], [vector], site, "backward", ranks)[1] if known is None else known.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOverRanks.apply(gradient, ctx.site, ctx.ranks, None), None, None, None


def _differentiable_gradients(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, statistics: BatchStats, site: LayerCollectives
) -> tuple[Tensor, ...]:
    """Return the gradients of `backward` by differentiable operations, for double backward.

    The layer is written as a function of x around the mean of the forward pass, with Σ(x - mean) and Σ(x - mean)² of all ranks as
    `_SumOverRanks`. Its derivative takes one collective, and the derivative of the gradient further ones: every rank must
    differentiate equally often.
    """
    if mask is not None:
        selected = select(dy, mask), select(x, mask)
        dx, *gradients = _differentiable_gradients(*selected, None, weight, statistics, site)
        return put_back(dx, mask, x), *gradients
    with torch.enable_grad():
        moments = moments_of(statistics)
        # A rank that needs no gradient of x also takes part in the collective.
        values = x if x.requires_grad else x.detach().requires_grad_()
        ones = torch.ones_like(moments.mean)
        scale = (ones if weight is None else weight).to(torch.float64).detach().requires_grad_()
        if weight is not None and weight.requires_grad:
            scale = weight.to(torch.float64)
        shift = torch.zeros_like(ones).requires_grad_()
        dimensions = kernels.reduced_dimensions(x)
        centred = values.to(torch.float64) - kernels.along_channels(moments.mean, x)
        local = torch.cat([centred.sum(dimensions), centred.square().sum(dimensions)])
        known = torch.cat([torch.zeros_like(ones), moments.m2])
        count = moments.count.clamp(min=1)
        mean, square = (_SumOverRanks.apply(local, site, statistics.ranks, known) / count).chunk(2)
        normalised = (centred - kernels.along_channels(mean, x)) * kernels.along_channels(
            (square - mean.square() + statistics.eps).rsqrt(), x
        )
        y = normalised * kernels.along_channels(scale, x) + kernels.along_channels(shift, x)
        dx, weight_gradient, bias_gradient = torch.autograd.grad(
            y, (values, scale, shift), dy.to(torch.float64), create_graph=True
        )
    return dx, weight_gradient, bias_gradient


def _forward_operator(
    x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, key: Tensor, share: bool
) -> tuple[Tensor, Tensor]:
    # The compiled graph does not hold the statistics, so `LayerCollectives` keeps the newest ones.
    y, statistics = forward(_plain(x), mask, weight, bias, eps, LayerCollectives.of(key), keep_record=True)
    return y, statistics.pack()


def _backward_operator(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, totals: Tensor, eps: float, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    site = LayerCollectives.of(key)
    statistics = BatchStats.unpack(totals, x.shape[1], eps, read=not x.is_cuda, ranks=site.ranks)
    dx, *gradients = backward(dy, _plain(x), mask, weight, statistics, site)
    weight_gradient, bias_gradient = (gradient.to(torch.float64) for gradient in gradients)
    return dx, weight_gradient, bias_gradient


def _plain(x: Tensor) -> Tensor:
    """Return a contiguous or channels-last tensor, whose result has a layout that the compiler can predict."""
    return x if kernels.is_columns(x) and x.movedim(1, -1).is_contiguous() else x.contiguous()


def _forward_shapes(
    x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, key: Tensor, share: bool
) -> tuple[Tensor, Tensor]:
    vectors = 3 if share else 2
    return torch.empty_like(_plain(x)), x.new_empty(vectors * x.shape[1] + 2, dtype=torch.float64)


def _backward_shapes(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, totals: Tensor, eps: float, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = totals.new_empty(x.shape[1])
    return torch.empty_like(_plain(x)), gradient, torch.empty_like(gradient)


torch.library.define(
    "syncbn::forward",
    "(Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, float eps, Tensor key, bool share) -> (Tensor, Tensor)",
)
torch.library.define(
    "syncbn::backward",
    "(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor totals, float eps, Tensor key)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("syncbn::forward", "default", _forward_operator)
torch.library.impl("syncbn::backward", "default", _backward_operator)
torch.library.register_fake("syncbn::forward", _forward_shapes)
torch.library.register_fake("syncbn::backward", _backward_shapes)
