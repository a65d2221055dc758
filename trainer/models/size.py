"""Size of a model on the meta device: parameters and saved activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.jobspec.memory import ModelSize
from trainer.norms.layers import is_norm


def measure_size(model: nn.Module, shape: Sequence[int] | None, *, has_norms: bool) -> ModelSize:
    """Count parameters, and numbers saved for backward per sample.

    The latter are those that autograd saves in a training step, not the sum of outputs: in-place results and
    views count once, and outputs that backward does not need do not count. Workspaces, masks and indices are
    not included, so the result is a lower bound.

    Args:
        model: model on the meta device; it is modified.
        shape: shape of a sample, channels first; None if unknown, in which case activations count as zero.
        has_norms: whether normalisation layers, each of which saves its input, stay in the model.
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
        # A difference of two batch sizes, since some tensors, such as standardised weights, do not depend on
        # it.
        activations = _count_saved(model, (3, *shape)) - _count_saved(model, (2, *shape))
    except Exception:  # code that meta tensors do not support; a worker will run it
        activations = 0
    return ModelSize(parameters=parameters, sample_activations=max(activations, 0))


class _Attention(torch.autograd.Function):
    """Attention that saves what a fused kernel saves: not the weight matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # (N, heads, queries, values), with the strides of the query as from a kernel, so that later views do
        # not copy it.
        result = torch.empty_like(query[..., :1].expand(*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result)
        return result


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Replace torch's attention, which has no fused kernel on the meta device."""
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _count_saved(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the floating-point numbers that a forward pass saves for backward.

    Parameters, buffers and the input are not included.
    """
    inputs = torch.empty(shape, device="meta")  # (N, *shape)
    known = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers(), inputs)}
    saved: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()._cdata
        if value.is_floating_point() and storage not in known:
            saved[storage] = value  # the reference keeps the address from being reused
        return value

    with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        outputs = model(inputs)
    del outputs
    return sum(value.untyped_storage().nbytes() // value.element_size() for value in saved.values())
