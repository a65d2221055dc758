"""Replacement of normalisation layers, and of the biases before them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from syncbn import convert_sync_batchnorm
from trainer.errors import ConfigurationError
from trainer.jobspec import Norm
from trainer.norms.factory import build_replacement, is_of_mode, makes_bias_redundant
from trainer.norms.layers import is_norm, is_unknown_norm
from trainer.norms.trace import Trace, trace_forward

FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.batch_norm,
        F.group_norm,
        F.instance_norm,
        F.layer_norm,
        F.rms_norm,
        torch.batch_norm,
        torch.group_norm,
        torch.instance_norm,
        torch.layer_norm,
        torch.native_batch_norm,
        torch.native_group_norm,
        torch.native_layer_norm,
        torch.rms_norm,
    }
)
"""Normalisation functions, which cannot be replaced without a layer."""


def replace_norms(
    model: nn.Module, norm: Norm, trace: Trace, sample: Tensor, process_group: ProcessGroup | None = None
) -> nn.Module:
    """Replace every normalisation layer of a model, in place, and return the model.

    A convolution or linear layer whose output goes only into normalisation layers loses its bias under
    `batch` and `sync`, which cancel it, and has one, initially 0, under the other modes. No random number is
    drawn.

    Args:
        model: any model. Layers that already have the mode remain the same objects.
        norm: mode of the layers.
        trace: trace of the unchanged model on `sample`.
        sample: batch of shape (N, *).
        process_group: ranks that share statistics under `sync`; None means all.

    Raises:
        ConfigurationError: a layer cannot be replaced; the error has its path and class. The model may have
            changed.
    """
    _refuse_what_cannot_be_switched(model, norm, trace)
    layers = {
        path: module
        for path, module in model.named_modules()
        if is_norm(module) and not is_of_mode(module, norm)
    }
    successors: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        try:
            successors[layer] = build_replacement(layer, norm, _dimensions(layer, trace))
        except ValueError as error:
            raise refusal(norm, path, layer, str(error)) from None
    for module in trace.feeds_norms_alone():
        _set_bias(module, norm)
    model = _replace(model, successors)
    if successors:
        _check_that_it_runs(model, norm, sample)
    return convert_sync_batchnorm(model, process_group) if norm is Norm.SYNC else model


def refusal(norm: Norm, path: str, module: nn.Module, reason: str) -> ConfigurationError:
    """Return the error for a module that prevents a mode."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    rule = f"must be a mode of all layers; cannot replace {path or 'the model'} ({kind}): {reason}"
    return ConfigurationError("norm", norm.value, rule)


def _refuse_what_cannot_be_switched(model: nn.Module, norm: Norm, trace: Trace) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise refusal(norm, path, module, "TorchScript modules cannot be changed")
        if is_unknown_norm(path, module):
            raise refusal(norm, path, module, "its class is not supported")
    for path, module, function, on_parameter in trace.calls:
        if function in FUNCTIONS and not on_parameter:  # standardisation of weights is allowed
            raise refusal(norm, path, module, f"it calls {function.__name__} without a layer")


def _dimensions(layer: nn.Module, trace: Trace) -> int:
    """Return the number of dimensions of the layer's inputs."""
    found = trace.dimensions.get(layer, set())
    if len(found) > 1:
        raise ValueError(f"its inputs differ in their number of dimensions: {sorted(found)}")
    if not found:
        raise ValueError("a forward pass in evaluation mode does not reach it, so its input is unknown")
    return next(iter(found))


def _set_bias(module: nn.Module, norm: Norm) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if makes_bias_redundant(norm):
        module.register_parameter("bias", None)
    elif module.bias is None:
        channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        module.bias = nn.Parameter(torch.zeros(channels, device=weight.device, dtype=weight.dtype))


def _replace(model: nn.Module, successors: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in successors:
                parent._modules[name] = successors[child]
        # torch's fused inference paths would read scale and shift of layer normalisations in these children.
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0
        elif isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False
    return successors.get(model, model)


def _check_that_it_runs(model: nn.Module, norm: Norm, sample: Tensor) -> None:
    """Raise ConfigurationError if the model fails after the replacement.

    Models may read attributes of their normalisation layers, or hold other references to them.
    """
    try:
        trace = trace_forward(model, sample)
    except Exception as error:
        reason = f"it fails with replaced normalisation layers: {type(error).__name__}: {error}"
        raise refusal(norm, "", model, reason) from error
    _refuse_what_cannot_be_switched(model, norm, trace)
