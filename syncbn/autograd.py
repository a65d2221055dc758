"""Autograd function of the layer, and its custom operators.

In eager mode `SyncBatchNormFunction` calls `syncbn.passes` directly. The compiler must not trace them, since
they wait for other ranks and read values; for the compiler they are the operators syncbn::forward
and syncbn::backward, which run the same code. A compiled layer issues the same collectives and computes the
same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.handle import HANDLE_TYPE, site_of
from syncbn.errors import ExportError, InputError
from syncbn.kernels import cuda
from syncbn.kernels.layout import is_columns
from syncbn.kernels.statistics import HEAD, BatchStats, RunningStats
from syncbn.passes import backward, differentiable_gradients, forward


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    site: LayerCollectives,
    mask: Tensor | None = None,
    running: RunningStats | None = None,
) -> tuple[Tensor, BatchStats]:
    """Normalise by the statistics of all ranks, differentiably.

    Running statistics are updated. `sync_batch_norm` has the formulas. `mask` is boolean with the shape of x
    without channels. Values where it is False are ignored and become 0.
    """
    if torch.compiler.is_exporting() or _is_recorded():
        raise ExportError(
            f"layer {site.name!r}: a program with synchronised statistics cannot be exported; export the "
            "model in evaluation mode, or after revert_sync_batchnorm"
        )
    if torch.compiler.is_compiling():
        # The setting is an argument, so that the compiler guards on it.
        output, vector = _NormaliseCompiled.apply(x, mask, weight, bias, eps, site.handle, site.share_wanted)
        statistics = BatchStats.of(vector, x.shape[1], eps)
        if running is not None:
            running.update(statistics, statistics.is_new & (statistics.count > 1))
        return output, statistics
    if torch._C._are_functorch_transforms_active():
        if running is not None:
            raise InputError(
                f"layer {site.name!r}: running statistics cannot be updated in a transform of torch.func; "
                "set track_running_stats to False, or use evaluation mode"
            )
        output, vector = _NormaliseTransformed.apply(x, mask, weight, bias, eps, site)
        return output, BatchStats.of(vector, x.shape[1], eps)
    output, statistics = SyncBatchNormFunction.apply(
        x, mask, weight, bias, eps, site, running, torch.is_grad_enabled()
    )
    return output, statistics


def _is_recorded() -> bool:
    """Return whether jit.trace or make_fx records operators, without collectives."""
    if torch.compiler.is_compiling():
        return False
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxies is not None or torch._C._get_tracing_state() is not None


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
        running: RunningStats | None,
        with_graph: bool,
    ) -> tuple[Tensor, BatchStats]:
        """See `syncbn.passes.forward`."""
        keep_record = not (with_graph and any(ctx.needs_input_grad))
        y, statistics = forward(x, mask, weight, bias, eps, site, running, keep_record)
        # The layer may be deleted before backward, which needs its collectives; and a checkpoint may
        # recompute this pass while the graph exists.
        ctx.site, ctx.statistics, ctx.record = site, statistics, site.newest
        ctx.save_for_backward(x, mask, weight)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Autograd does not allow in-place changes of an output that is a view.
        return y.data if y._is_view() else y, statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """See `syncbn.passes.backward`."""
        x, mask, weight = ctx.saved_tensors
        differentiate = differentiable_gradients if torch.is_grad_enabled() else backward
        gradients = differentiate(
            torch.zeros_like(x) if dy is None else dy, x, mask, weight, ctx.statistics, ctx.site
        )
        return *_wanted(ctx, weight, *gradients), None


class _NormaliseTransformed(Function):
    """Autograd function in transforms of torch.func.

    It is separate, since binding the arguments of a function with `setup_context` costs tens of microseconds.
    """

    @staticmethod
    def forward(
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        site: LayerCollectives,
    ) -> tuple[Tensor, Tensor]:
        """See `syncbn.passes.forward`."""
        y, statistics = forward(x, mask, weight, bias, eps, site, None, keep_record=False)
        return y.data, statistics.vector

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Save what backward needs."""
        x, mask, weight, bias, ctx.eps, ctx.site = inputs
        ctx.save_for_backward(x, mask, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """See `syncbn.passes.differentiable_gradients`."""
        x, mask, weight, vector = ctx.saved_tensors
        group = ctx.site.last_group
        statistics = BatchStats.of(vector, x.shape[1], ctx.eps, group=group)
        gradients = differentiable_gradients(dy, x, mask, weight, statistics, ctx.site)
        return _wanted(ctx, weight, *gradients)[:6]

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *others: Any,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Normalise by one call, in which the mapped dimension is part of the channels."""
        x_dim, mask_dim, *parameter_dims = in_dims[:4]
        if mask_dim is not None:
            raise InputError("mask: must not be mapped by torch.func.vmap")
        size = info.batch_size
        x = x.unsqueeze(1).expand(-1, size, *x.shape[1:]) if x_dim is None else x.movedim(x_dim, 1)
        parameters = [
            None
            if parameter is None
            else (parameter if dim is None else parameter.movedim(dim, 0)).expand(x.shape[1:3]).flatten()
            for parameter, dim in zip((weight, bias), parameter_dims, strict=True)
        ]
        y, vector = _NormaliseTransformed.apply(x.flatten(1, 2), mask, *parameters, *others)
        per_channel = vector[HEAD:].view(-1, *x.shape[1:3]).movedim(1, 0).flatten(1)  # (size, 2C or 3C)
        vector = torch.cat([vector[:HEAD].expand(size, HEAD), per_channel], dim=1)
        return (y.view(x.shape), vector), (1, 0)


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
        handle: Any,
        share: bool,
    ) -> tuple[Tensor, Tensor]:
        y, vector, rounded = torch.ops.syncbn.forward(x, mask, weight, bias, eps, handle, share)
        ctx.save_for_backward(x, mask, weight, vector, rounded)
        ctx.handle = handle
        ctx.mark_non_differentiable(vector)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps = eps
        return y, vector

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, mask, weight, *statistics = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        gradients = torch.ops.syncbn.backward(dy, x, mask, weight, *statistics, ctx.eps, ctx.handle)
        return _wanted(ctx, weight, *gradients)


def _wanted(
    ctx: Any, weight: Tensor | None, dx: Tensor, weight_gradient: Tensor, bias_gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the requested gradients in the order of forward's arguments.

    Gradients of parameters have the dtypes of the parameters.
    """
    return (
        dx if ctx.needs_input_grad[0] else None,
        None,
        weight_gradient.to(weight.dtype) if weight is not None and ctx.needs_input_grad[2] else None,
        bias_gradient.to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None,
        None,
        None,
        None,
    )


def _forward_operator(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    handle: Any,
    share: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # The compiled graph does not hold the statistics, so `LayerCollectives` keeps the newest ones. The graph
    # updates running statistics itself.
    site = site_of(handle)
    y, statistics = forward(_plain(x), mask, weight, bias, eps, site, None, keep_record=True)
    rounded = statistics.rounded
    return y, statistics.vector.clone(), x.new_empty(0) if rounded is None else rounded.clone()


def _backward_operator(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    vector: Tensor,
    rounded: Tensor,
    eps: float,
    handle: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    site = site_of(handle)
    count = None if cuda.is_native(x) else vector[1].item()
    statistics = BatchStats.of(vector, x.shape[1], eps, count=count, rounded=rounded, group=site.last_group)
    dx, *gradients = backward(dy, _plain(x), mask, weight, statistics, site)
    weight_gradient, bias_gradient = (gradient.to(torch.float64) for gradient in gradients)
    return dx, weight_gradient, bias_gradient


def _plain(x: Tensor) -> Tensor:
    """Return a contiguous or channels-last tensor.

    The compiler can predict the layout of a result only for these.
    """
    return x if x.is_contiguous() or is_columns(x) else x.contiguous()


def _forward_shapes(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    handle: Any,
    share: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    vector = x.new_empty(HEAD + (3 if share else 2) * channels, dtype=torch.float64)
    rounded = x.new_empty(2, channels, dtype=cuda.accumulator(x)) if cuda.is_native(x) else x.new_empty(0)
    return torch.empty_like(_plain(x)), vector, rounded


def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    vector: Tensor,
    rounded: Tensor,
    eps: float,
    handle: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = vector.new_empty(x.shape[1])
    return torch.empty_like(_plain(x)), gradient, torch.empty_like(gradient)


# Ranks meet in these operators, and their stamps change: no CUDA graph may contain them.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
torch.library.define(
    "syncbn::forward",
    f"(Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, float eps, {HANDLE_TYPE} handle, bool share)"
    " -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
torch.library.define(
    "syncbn::backward",
    "(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor vector, Tensor rounded, float eps,"
    f" {HANDLE_TYPE} handle) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
torch.library.impl("syncbn::forward", "default", _forward_operator)
torch.library.impl("syncbn::backward", "default", _backward_operator)
torch.library.register_fake("syncbn::forward", _forward_shapes)
torch.library.register_fake("syncbn::backward", _backward_shapes)
