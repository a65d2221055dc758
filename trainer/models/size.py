"""Size of a model: parameters and saved activations, on the meta device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.jobspec.memory import ModelSize
from trainer.norms.layers import is_norm


def measure_size(model: nn.Module, shape: Sequence[int] | None, *, has_norms: bool) -> ModelSize:
    """Count a model's parameters, and the floating numbers that autograd saves for each sample of a training step.

    That is what torch itself saves, not a sum of outputs: values that are computed in place or viewed count once, and those that
    backward does without do not count. Workspaces, masks and indices are left out: a step takes at least as much.

    Args:
        model: on the meta device; it is changed.
        shape: of a sample, channels first; None if it is not known, and then activations count as nothing.
        has_norms: whether normalisation layers stay, each of which saves its input; otherwise they are taken out.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if shape is None:
        return ModelSize(parameters=parameters, sample_activations=0)
    if not has_norms:
        for path, module in list(model.named_modules()):
            if is_norm(module) and path:
                model.set_submodule(path, nn.Identity())
    model.train()
    try:
        # The difference, as some numbers, such as standardised weights, are saved once for the batch.
        activations = _count_saved(model, (3, *shape)) - _count_saved(model, (2, *shape))
    except Exception:  # whatever a model's code does that a tensor without values cannot; a worker will run it
        activations = 0
    return ModelSize(parameters=parameters, sample_activations=max(activations, 0))


class _Attention(torch.autograd.Function):
    """Attention as a fused kernel keeps it for backward: without the matrix of its weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (N, heads, queries, values), laid out in memory as the query, so that it is copied afterwards no more than a kernel's.
        result = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result)
        return result


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace torch's attention, which has no fused kernel on the meta device, but on processors and GPUs."""
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _count_saved(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the floating numbers that a forward pass saves for backward, apart from parameters, buffers and the input."""
    inputs = torch.empty(shape, device="meta")  # (N, *shape)
    known = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers(), inputs)}
    saved: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()._cdata
        if value.is_floating_point() and storage not in known:
            saved[storage] = value  # kept, so that its storage's address is not used again
        return value

    with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        outputs = model(inputs)
    del outputs
    return sum(value.untyped_storage().nbytes() // value.element_size() for value in saved.values())
