"""Siblings: layers of independent inputs that exchange statistics in one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.collectives.context import LayerCollectives, RecomputeCache
from syncbn.collectives.reduce import all_reduce_together, group_of_pass
from syncbn.errors import GroupError
from syncbn.kernels.layout import arrange, arrange_like, rearrange
from syncbn.kernels.statistics import BatchStats, RunningStats
from syncbn.module import SyncBatchNorm
from syncbn.passes import (
    backward_call,
    differentiable_gradients,
    measure,
    normalise_values,
    pack_backward,
    pack_forward,
    recall,
    unpack_backward,
    unpack_forward,
)


def apply_together(layers: Sequence[SyncBatchNorm], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Apply each layer to its input, by one collective each way for all of them.

    The inputs must not depend on each other's outputs: branches of an Inception block, or the main path and
    the downsampling path of a ResNet block. The outputs are those of the layers applied one by one, to the
    last bits. Where they share a message, hooks of the modules do not run.

    Layers are applied one by one where they cannot share a message: in evaluation mode, in a compiled graph,
    in transforms of torch.func, for float64 inputs, on one rank, and where a layer is of a subclass. This
    depends only on what is equal on every rank.

    Collectives: in training one forward and one backward, of the sum of the layers' bytes.

    Args:
        layers: layers in training mode, all with the same process group.
        inputs: one input per layer, shape (N, C, *).

    Returns:
        One output per layer.

    Raises:
        ValueError: there are not as many inputs as layers.
        GroupError: the layers have different process groups.
        InputError, DesyncError: as of the layers.
    """
    pairs = list(zip(layers, inputs, strict=True))
    if not _can_share(pairs):
        return [layer(x) for layer, x in pairs]
    for layer, x in pairs:
        layer._check(x)
    groups = {id(layer.process_group): layer.process_group for layer, _ in pairs}
    if len(groups) > 1:
        raise GroupError("layers: must have the same process group (got different ones)")
    parameters = [vector for layer, x in pairs for vector in (x, layer.weight, layer.bias)]
    results = _Together.apply(
        [(layer._site, layer.eps, layer._running_statistics()) for layer, _ in pairs],
        torch.is_grad_enabled(),
        *parameters,
    )
    for (layer, _), statistics in zip(pairs, results[-1], strict=True):
        layer._report(statistics)
    return list(results[:-1])


def _can_share(pairs: list[tuple[SyncBatchNorm, Tensor]]) -> bool:
    return (
        len(pairs) > 1
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(
            type(layer) is SyncBatchNorm and layer.training and x.dtype != torch.float64 for layer, x in pairs
        )
        and group_of_pass(pairs[0][0]._site) is not None
    )


Setting = tuple[LayerCollectives, float, RunningStats | None]


class _Together(Function):
    """Autograd function of several layers."""

    @staticmethod
    def forward(ctx: Any, settings: list[Setting], with_graph: bool, *tensors: Any) -> tuple[Any, ...]:
        xs, weights, biases = tensors[::3], tensors[1::3], tensors[2::3]
        keep_record = not (with_graph and any(ctx.needs_input_grad))
        values = [arrange(x) for x in xs]
        statistics, ctx.records = _exchange(values, settings, keep_record)
        ctx.statistics, ctx.sites = statistics, [site for site, *_ in settings]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.save_for_backward(*xs, *weights)
        ctx.set_materialize_grads(False)
        results = map(normalise_values, values, statistics, weights, biases)
        outputs = [rearrange(*each).data for each in zip(results, xs, values, strict=True)]
        return *outputs, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        count = len(tensors) // 2
        xs, weights = tensors[:count], tensors[count:]
        dys = [torch.zeros_like(x) if dy is None else dy for x, dy in zip(xs, gradients[:-1], strict=True)]
        items = list(zip(dys, xs, weights, ctx.statistics, ctx.sites, strict=True))
        if torch.is_grad_enabled():
            results: Sequence[tuple[Tensor, ...]] = [
                differentiable_gradients(dy, x, None, *others) for dy, x, *others in items
            ]
        else:
            results = _differentiate(items)
        wanted: list[Tensor | None] = []
        for (dx, dw, db), weight, dtype in zip(results, weights, ctx.bias_dtypes, strict=True):
            wanted += [
                dx,
                None if weight is None else dw.to(weight.dtype),
                None if dtype is None else db.to(dtype),
            ]
        needed = ctx.needs_input_grad[2:]
        return None, None, *(each if needs else None for each, needs in zip(wanted, needed, strict=True))


def _exchange(
    values: list[Tensor], settings: list[Setting], keep_record: bool
) -> tuple[list[BatchStats], list[RecomputeCache | None]]:
    """Return statistics of all ranks for each input, and records for a recomputation."""
    local = [measure(each) for each in values]
    found = [recall(x, own, site) for x, own, (site, _, _) in zip(values, local, settings, strict=True)]
    missing = [position for position, statistics in enumerate(found) if statistics is None]
    calls, packed = [], []
    for position in missing:
        site, _, running = settings[position]
        group = group_of_pass(site)
        assert group is not None, "layers of one rank are applied one by one"
        calls.append(site.next_call("forward", group))
        packed.append(pack_forward(values[position], local[position], calls[-1].stamp, site, running))
    summed = all_reduce_together(packed, calls) if missing else []
    records = []
    for position, call, (vector, check) in zip(missing, calls, summed, strict=True):
        site, eps, running = settings[position]
        operands = values[position], local[position]
        statistics = unpack_forward(*operands, vector, check, eps, site, running)
        statistics.group = ref(call.group)
        site.store(*operands, statistics, keep_record)
        records.append(site.newest)  # the layer may be there twice
        found[position] = statistics
    return [statistics for statistics in found if statistics is not None], records


def _differentiate(items: list[Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the gradients of each input, weight and bias."""
    operands, packed, calls = [], [], []
    for dy, x, weight, statistics, site in items:
        values = arrange(x)
        call = backward_call(statistics, site)
        assert call is not None, "layers of one rank are applied one by one"
        operands.append((arrange_like(dy, values), values, weight, statistics))
        packed.append(pack_backward(*operands[-1], call.stamp))
        calls.append(call)
    summed = all_reduce_together([vector for vector, *_ in packed], calls)
    return [
        (rearrange(unpack_backward(*operand, *total), x, operand[1]), weight_gradient, bias_gradient)
        for operand, (_, weight_gradient, bias_gradient), total, (_, x, *_) in zip(
            operands, packed, summed, items, strict=True
        )
    ]
