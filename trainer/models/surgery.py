"""Changes to a library model: activation, weight scale, dropout, LRN."""

import difflib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from trainer.errors import ConfigurationError
from trainer.jobspec import LibraryModelSpec
from trainer.models.networks import ACTIVATIONS, LOCAL_RESPONSE_SIZE
from trainer.norms import Trace
from trainer.norms.layers import forward_of

# fmt: off
ACTIVATION_NAMES = frozenset(
    {
        "CELU", "ELU", "GELU", "GELUTanh", "HardMish", "HardMishMe", "HardSwish", "HardSwishMe", "Hardswish",
        "LeakyReLU", "Mish", "MishMe", "PReLU", "QuickGELU", "ReLU", "ReLU6", "SELU", "SiLU", "Softplus",
        "Swish", "SwishMe",
    }
)
# fmt: on
"""Classes of torch and timm that are a network's nonlinearity; sigmoids are not, since library models have them as gates."""
ACTIVATION_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.celu,
        F.elu,
        F.gelu,
        F.hardswish,
        F.leaky_relu,
        F.mish,
        F.relu,
        F.relu6,
        F.selu,
        F.silu,
        torch.relu,
        torch.Tensor.relu,
    }
)
BASIC_CONV = {"torchvision.models.googlenet.BasicConv2d", "torchvision.models.inception.BasicConv2d"}
"""Convolution, norm and a functional ReLU, in modules that hold the first two as `conv` and `bn`."""


def alter(model: nn.Module, spec: LibraryModelSpec) -> None:
    """Change a model in place. No random number is drawn.

    Raises ConfigurationError for a change that finds nothing to change.
    """
    if spec.activation is not None:
        _replace_activations(model, spec, spec.activation)
    if spec.dropout is not None:
        _set_dropout(model, spec, spec.dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.mul_(spec.init_scale)
    for path in spec.local_response_norm_after:
        _append_local_response_norm(model, path)


def refuse_functional_activations(spec: LibraryModelSpec, trace: Trace) -> None:
    """Raise ConfigurationError if a model that was given an activation still calls one of its own, in the code of a module."""
    for path, module, function, _ in trace.calls:
        if function in ACTIVATION_FUNCTIONS and not _is_activation(module):
            where = f"{path or 'the model'} ({forward_of(module)})"
            takes = f"cannot be replaced in {spec.name}: {where} calls {function.__name__} itself"
            raise ConfigurationError("model.activation", spec.activation, takes)


def _replace_activations(model: nn.Module, spec: LibraryModelSpec, activation: str) -> None:
    replaced = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if forward_of(child) in BASIC_CONV:
                parts = OrderedDict(child.named_children(), activation=ACTIVATIONS[activation]())
                setattr(parent, name, nn.Sequential(parts))
            elif _is_activation(child):
                setattr(parent, name, ACTIVATIONS[activation]())
            else:
                continue
            replaced += 1
    if not replaced:
        raise ConfigurationError("model.activation", activation, f"{spec.name} has no activation to replace")


def _is_activation(module: nn.Module) -> bool:
    return type(module).__name__ in ACTIVATION_NAMES and not module._modules


def _set_dropout(model: nn.Module, spec: LibraryModelSpec, probability: float) -> None:
    """Set dropout layers, and the attribute that both libraries' models have where they call dropout as a function."""
    found = False
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p, found = probability, True
        if isinstance(getattr(module, "drop_rate", None), int | float):
            module.drop_rate, found = probability, True  # type: ignore[assignment]
    if not found and probability > 0:
        raise ConfigurationError("model.dropout", probability, f"{spec.name} has no dropout layer")


def _append_local_response_norm(model: nn.Module, path: str) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    if path not in paths:
        close = ", ".join(difflib.get_close_matches(path, paths, n=5)) or ", ".join(paths[:5])
        takes = f"must be paths of the model's modules, such as {close}"
        raise ConfigurationError("model.local_response_norm_after", path, takes)
    layer = model.get_submodule(path)
    layers = OrderedDict(layer=layer, local_response_norm=nn.LocalResponseNorm(LOCAL_RESPONSE_SIZE))
    model.set_submodule(path, nn.Sequential(layers))
