"""Forward and backward of the synchronised layer: the collectives between the passes, and what autograd sees of them.

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

    Where a mask, boolean and of the shape of x without channels, is False, a value counts nowhere and becomes 0.
    """
    if torch.compiler.is_compiling():
        # The setting is an argument here, so that the compiler notices if it changes.
        output, totals = _NormaliseCompiled.apply(x, mask, weight, bias, eps, site.key, site.share_wanted)
        return output, BatchStats.unpack(totals, x.shape[1], eps, read=False)
    output, statistics = SyncBatchNormFunction.apply(x, mask, weight, bias, eps, site, torch.is_grad_enabled())
    return output, statistics


def moments_of(statistics: BatchStats) -> Moments:
    """Return count, mean and M2."""
    count = torch.as_tensor(statistics.count, dtype=torch.float64, device=statistics.moments.device)
    return Moments(count, statistics.mean, statistics.variance * count)


class SyncBatchNormFunction(Function):
    """The layer in eager use."""

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
        # The layer may be gone by the time of backward; what its collectives need must not be. And as long as the graph
        # lives, a checkpoint may run this again.
        ctx.site, ctx.statistics, ctx.record = site, statistics, site.newest
        ctx.save_for_backward(x, mask, weight)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The passes hand back views of what they made, and autograd would forbid to change such an output in place.
        return y.data, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """See `backward` of this module."""
        x, mask, weight = ctx.saved_tensors
        differentiate = _differentiable_gradients if torch.is_grad_enabled() else backward
        gradients = differentiate(torch.zeros_like(x) if dy is None else dy, x, mask, weight, ctx.statistics, ctx.site)
        return _wanted(ctx, weight, *gradients)


class _NormaliseCompiled(Function):
    """The layer as the compiler sees it."""

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
    """Return the gradients that autograd asks for, in the order of forward's arguments and in the parameters' dtypes."""
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
    """Return the values that count, as a (n, C) batch: uneven numbers on the ranks, or none, are nothing special then."""
    return x.movedim(1, -1)[mask]


def put_back(values: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Give what was made of selected values the shape and memory format of x, with 0 in the other places."""
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
    """Measure, exchange, normalise."""
    if mask is not None:
        y, statistics = forward(select(x, mask), None, weight, bias, eps, site, keep_record)
        return put_back(y, mask, x), statistics
    statistics = _exchange_moments(x, eps, site, keep_record)
    return kernels.normalise(x, statistics, weight, bias), statistics


def _exchange_moments(x: Tensor, eps: float, site: LayerCollectives, keep_record: bool) -> BatchStats:
    """Measure x and merge with the other ranks, in one collective; a rank alone needs none."""
    count = x.numel() // x.shape[1]
    # The branches depend on the group's size, the dtype and the layer's settings, which are the same on every rank, and
    # never on the number of values or on requires_grad, which are not; a recomputation is one on every rank. So no rank
    # can miss the collective that the others are in.
    in_float64 = x.dtype == torch.float64
    sums = kernels.measure(x) if in_float64 else kernels.measure_sums(x)
    if (recalled := site.lookup(x, sums)) is not None:
        return replace(recalled, update_count=0.0)
    exchange = _exchange_parts if in_float64 else _exchange_sums
    statistics = replace(exchange(count, *sums, eps, site), ranks=group_size(site.process_group))
    site.ranks = statistics.ranks
    # A total of 1 means that no rank has more than 1. So every rank then looks at the total, and all raise together;
    # and in any other case a rank with more than 1 does not make the host wait for its device.
    if count <= 1 and statistics.count == 1:
        raise InputError(
            f"all ranks together hold 1 value per channel, this one an input of shape {tuple(x.shape)}; "
            "taken are 2 or more in training"
        )
    site.store(x, sums, statistics, keep_record)
    return statistics


def _exchange_sums(count: int, total: Tensor, squares: Tensor, eps: float, site: LayerCollectives) -> BatchStats:
    """Add up [n, Σx, Σx²] of the ranks: mean = Σx / n, variance = Σx² / n - mean².

    The subtraction leaves in the variance an error of some 2^-52·mean², which is below what float32 values resolve.
    """
    parts = [total, squares]
    if site.share_wanted:
        parts.append(squares.to(torch.float64).addcmul(total.to(torch.float64), total, value=-1 / max(count, 1)))
    (everyone,), sums = sum_over_ranks([count], parts, site, "forward")
    channels = len(total)
    moments = sums[: 2 * channels].view(2, channels).div_(at_least_one(everyone))
    mean, variance = moments.unbind()
    # Rounding can take the variance of a constant channel below zero, and the root of that would be NaN.
    variance.addcmul_(mean, mean, value=-1).clamp_(min=0)
    return BatchStats(everyone, everyone, moments, sums[2 * channels :] if site.share_wanted else None, eps)


def _exchange_parts(count: int, mean: Tensor, m2: Tensor, eps: float, site: LayerCollectives) -> BatchStats:
    """Gather [n, mean, M2] of the ranks and merge them.

    To add n·mean² and subtract it again would cost float64 values (mean/std)² units in the last place. A shift would
    avoid it, but nothing is sure to be shared before the first collective: the running mean starts at 0, and if the
    ranks had loaded different buffers, the error would be silent. Hence the parts, unmixed.
    """
    # Ranks that differ in dtype are in different phases, and are told so.
    gathered = gather_from_ranks([count], [mean, m2], site, "forward in float64")
    parts = [Moments.unpack(part) for part in gathered]
    merged = Moments.merge(parts)
    within = torch.stack([part.m2 for part in parts]).sum(0) if site.share_wanted else None
    everyone = merged.count if merged.count.is_cuda else merged.count.item()
    return BatchStats(everyone, everyone, torch.stack([merged.mean, merged.variance]), within, eps)


def backward(
    dy: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor | None, statistics: BatchStats, site: LayerCollectives
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce, exchange, combine; return the gradients of x, weight and bias, the latter two as accumulated."""
    if mask is not None:
        dx, weight_gradient, bias_gradient = backward(select(dy, mask), select(x, mask), None, weight, statistics, site)
        return put_back(dx, mask, x), weight_gradient, bias_gradient
    bias_gradient, weight_gradient = kernels.reduce_gradient(dy, x, statistics)
    # A rank that is empty or needs no gradient of x adds its sums all the same: they are part of the other ranks'
    # dx, and those could not know that this one stayed away. So nothing but the group's size decides here.
    # The zero makes the vector as long as forward's, so that they share a lane, and backends that have none do not break
    # down when a rank that skipped a layer brings its backward's: it is found out by its stamp.
    _, sums = sum_over_ranks([0], [bias_gradient, weight_gradient], site, "backward", statistics.ranks)
    gradient_means = sums.view(2, x.shape[1]).div_(at_least_one(statistics.count))
    dx = kernels.combine_gradient(dy, x, statistics, weight, gradient_means)
    return dx, weight_gradient, bias_gradient


class _SumOverRanks(Function):
    """The sum of the ranks' vectors, whose gradient is the sum of the ranks' gradients, as often as one likes.

    A sum that is known already is not exchanged again.
    """

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
    """Return the gradients that `backward` does, by operations that autograd can differentiate in their turn.

    The layer is written once more as a function of x, around the mean known from the forward pass, with Σ(x - mean) and
    Σ(x - mean)² of all ranks as `_SumOverRanks`. To differentiate it takes one collective, and to differentiate the
    gradient takes more: every rank differentiates alike.
    """
    if mask is not None:
        selected = select(dy, mask), select(x, mask)
        dx, *gradients = _differentiable_gradients(*selected, None, weight, statistics, site)
        return put_back(dx, mask, x), *gradients
    with torch.enable_grad():
        moments = moments_of(statistics)
        # Also a rank that needs no gradient of x takes part in the collective on the way to it.
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
    # The graph holds no record; so the call site keeps some.
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
    """Make any other layout contiguous, so that the compiler can tell that of the result."""
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
