"""Forward and backward of the synchronised layer: the collectives between the passes, and what autograd sees of them.

In eager use `_Normalise` calls `forward` and `backward` as they stand. The compiler must not look into them, as they wait
for other ranks and look at values; to it they are the operators syncbn::forward and syncbn::backward, which run the same
code. So a compiled layer issues the same collectives and computes the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn import kernels
from syncbn.callsite import CallSite
from syncbn.collective import gather_from_ranks, group_size, sum_over_ranks
from syncbn.errors import InputError
from syncbn.moments import Moments


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, site: CallSite
) -> tuple[Tensor, Tensor]:
    """Normalise by the statistics of all ranks, differentiably; `sync_batch_norm` has the formulas.

    Returns:
        The output; and a float64 vector [news, n, mean, M2] of 2C + 2 elements, with C more, Σᵢ M2ᵢ, where the call site
        wants to know the share of the variance between ranks. n counts the values of all ranks. news is n too, or 0 in
        a recomputation, whose statistics no running average shall see twice.
    """
    output, totals = _Normalise.apply(x, weight, bias, eps, site.key, torch.is_grad_enabled())
    return output, totals


class _Normalise(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, key: int, with_graph: bool
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            y, totals = torch.ops.syncbn.forward(x, weight, bias, eps, key)
        else:
            y, totals = forward(x, weight, bias, eps, key, keep_record=not with_graph)
            # As long as the graph lives, a checkpoint may run this again.
            ctx.record = CallSite.of(key).newest
            # The passes hand back views of what they made, and autograd would forbid to change such an output in place.
            y = y.data
            # The layer may be gone by the time of backward; what its collectives need must not be.
            ctx.site = CallSite.of(key)
        ctx.save_for_backward(x, weight, totals)
        ctx.mark_non_differentiable(totals)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps, ctx.key = eps, key
        return y, totals

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, weight, totals = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(x)
        if torch.compiler.is_compiling():
            dx, weight_gradient, bias_gradient = torch.ops.syncbn.backward(dy, x, weight, totals, ctx.eps, ctx.key)
        elif torch.is_grad_enabled():
            dx, weight_gradient, bias_gradient = _differentiable_gradients(dy, x, weight, totals, ctx.eps, ctx.key)
        else:
            dx, weight_gradient, bias_gradient = backward(dy, x, weight, totals, ctx.eps, ctx.key)
        return (
            dx if ctx.needs_input_grad[0] else None,
            weight_gradient.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            bias_gradient.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, key: int, keep_record: bool = True
) -> tuple[Tensor, Tensor]:
    """Measure, exchange, normalise; the result as in `normalise`."""
    totals = _exchange_moments(x, CallSite.of(key), keep_record)
    moments = Moments.unpack(totals[1 : 2 * x.shape[1] + 2])
    variance = moments.variance + eps
    deviation_inverse = variance.rsqrt()
    far = None if kernels.is_small(x) else kernels.far_channels(moments.mean, variance)
    scale = deviation_inverse if weight is None else deviation_inverse * weight
    return kernels.normalise(x, moments.mean, scale, bias, far), totals


def _exchange_moments(x: Tensor, site: CallSite, keep_record: bool) -> Tensor:
    """Measure x and merge with the other ranks, in one collective; a rank alone needs none."""
    moments = Moments.measure(x)
    local = moments.pack()
    # The branches depend on the group's size, the dtype and the layer's settings, which are the same on every rank, and
    # never on the number of values or on requires_grad, which are not; a recomputation is one on every rank. So no rank
    # can miss the collective that the others are in.
    if (recalled := site.recall(local)) is not None:
        return torch.cat([recalled.new_zeros(1), recalled[1:]])
    if group_size(site.process_group) == 1:
        within = moments.m2
    elif x.dtype == torch.float64:
        # To add n·mean² and subtract it again would cost float64 values (mean/std)² units in the last place. A shift
        # would avoid it, but nothing is sure to be shared before the first collective: the running mean starts at 0,
        # and if the ranks had loaded different buffers, the error would be silent. Hence the parts, unmixed.
        parts = [Moments.unpack(part) for part in gather_from_ranks([local], site.next_call("forward"))]
        moments = Moments.merge(parts)
        within = torch.stack([part.m2 for part in parts]).sum(0)
    else:
        vectors = [moments.pack_sums(), moments.m2] if site.share_wanted else [moments.pack_sums()]
        total = sum_over_ranks(vectors, site.next_call("forward"))
        moments = Moments.unpack_sums(total[: local.numel()])
        within = total[local.numel() :]
    # A total of 1 means that no rank has more than 1. So every rank then looks at the total, and all raise together;
    # and in any other case a rank with more than 1 does not make the host wait for its device.
    if x.numel() <= x.shape[1] and moments.count == 1:
        raise InputError(
            f"all ranks together hold 1 value per channel, this one an input of shape {tuple(x.shape)}; "
            "taken are 2 or more in training"
        )
    count = moments.count.view(1)
    totals = torch.cat([count, count, moments.mean, moments.m2, *([within] if site.share_wanted else [])])
    site.remember(local, totals, keep_record)
    return totals


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, totals: Tensor, eps: float, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce, exchange, combine; return the gradients of x, weight and bias, the latter two in float64."""
    site = CallSite.of(key)
    moments = Moments.unpack(totals[1 : 2 * x.shape[1] + 2])
    variance = moments.variance + eps
    deviation_inverse = variance.rsqrt()
    bias_gradient, weight_gradient = kernels.reduce_gradient(dy, x, moments.mean, deviation_inverse)
    # A rank that is empty or needs no gradient of x adds its sums all the same: they are part of the other ranks'
    # dx, and those could not know that this one stayed away. So nothing but the group's size decides here.
    # The zero makes the vector as long as forward's. Backends break down when a rank that skipped a layer brings a vector
    # of another length; of the same length, it is found out by its stamp.
    total = torch.cat([bias_gradient, weight_gradient, totals.new_zeros(1)])
    if group_size(site.process_group) > 1:
        total = sum_over_ranks([total], site.next_call("backward"))
    # Without any value on any rank there is nothing to divide by, and 0/0 would be NaN.
    offset, mean_dy_normalised = (total[:-1] / moments.count.clamp(min=1)).chunk(2)
    scale = deviation_inverse if weight is None else deviation_inverse * weight
    far = None if kernels.is_small(x) else kernels.far_channels(moments.mean, variance)
    factor = mean_dy_normalised * deviation_inverse * scale
    dx = kernels.combine_gradient(dy, x, moments.mean, scale, factor, offset, far)
    return dx, weight_gradient, bias_gradient


class _SumOverRanks(Function):
    """The sum of the ranks' vectors, whose gradient is the sum of the ranks' gradients, as often as one likes.

    A sum that is known already is not exchanged again.
    """

    @staticmethod
    def forward(ctx: Any, vector: Tensor, key: int, known: Tensor | None) -> Tensor:
        ctx.key = key
        site = CallSite.of(key)
        if known is not None:
            return known.clone()
        if group_size(site.process_group) == 1:
            return vector.clone()
        return sum_over_ranks([vector], site.next_call("backward"))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOverRanks.apply(gradient, ctx.key, None), None, None


def _differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, totals: Tensor, eps: float, key: int
) -> tuple[Tensor, ...]:
    """Return the gradients that `backward` does, by operations that autograd can differentiate in their turn.

    The layer is written once more as a function of x, around the mean known from the forward pass, with Σ(x - mean) and
    Σ(x - mean)² of all ranks as `_SumOverRanks`. To differentiate it takes one collective, and to differentiate the
    gradient takes more: every rank differentiates alike.
    """
    with torch.enable_grad():
        moments = Moments.unpack(totals[1 : 2 * x.shape[1] + 2])
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
        mean, square = (_SumOverRanks.apply(local, key, known) / count).chunk(2)
        normalised = (centred - kernels.along_channels(mean, x)) * kernels.along_channels(
            (square - mean.square() + eps).rsqrt(), x
        )
        y = normalised * kernels.along_channels(scale, x) + kernels.along_channels(shift, x)
        dx, weight_gradient, bias_gradient = torch.autograd.grad(
            y, (values, scale, shift), dy.to(torch.float64), create_graph=True
        )
    return dx, weight_gradient, bias_gradient


def _forward_operator(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, key: int
) -> tuple[Tensor, Tensor]:
    return forward(_plain(x), weight, bias, eps, key)


def _backward_operator(
    dy: Tensor, x: Tensor, weight: Tensor | None, totals: Tensor, eps: float, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dy, _plain(x), weight, totals, eps, key)


def _plain(x: Tensor) -> Tensor:
    """Make any other layout contiguous, so that the compiler can tell that of the result."""
    return x if kernels.is_columns(x) and x.movedim(1, -1).is_contiguous() else x.contiguous()


def _forward_shapes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, key: int
) -> tuple[Tensor, Tensor]:
    vectors = 3 if CallSite.of(key).share_wanted else 2
    return torch.empty_like(_plain(x)), x.new_empty(vectors * x.shape[1] + 2, dtype=torch.float64)


def _backward_shapes(
    dy: Tensor, x: Tensor, weight: Tensor | None, totals: Tensor, eps: float, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = totals.new_empty(x.shape[1])
    return torch.empty_like(_plain(x)), gradient, torch.empty_like(gradient)


torch.library.define(
    "syncbn::forward", "(Tensor x, Tensor? weight, Tensor? bias, float eps, int key) -> (Tensor, Tensor)"
)
torch.library.define(
    "syncbn::backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor totals, float eps, int key) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("syncbn::forward", "default", _forward_operator)
torch.library.impl("syncbn::backward", "default", _backward_operator)
torch.library.register_fake("syncbn::forward", _forward_shapes)
torch.library.register_fake("syncbn::backward", _backward_shapes)
