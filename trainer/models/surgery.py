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
"""Classes of torch and timm that are a network's nonlinearity; sigmoids are not, since library models have
them as gates.
"""
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
"""Modules of a convolution `conv`, a norm `bn` and a functional ReLU."""


def modify(model: nn.Module, spec: LibraryModelSpec) -> None:
    """Change a model in place, without drawing random numbers.

    Raises ConfigurationError for a change that does not apply to the model.
    """
    if spec.activation is not None:
        _replace_activations(model, spec, spec.activation)
    if spec.dropout is not None:
        _set_dropout(model, spec, spec.dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Matrices and kernels only: scales of norms are vectors.
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.mul_(spec.init_scale)
    for path in spec.local_response_norm_after:
        _append_local_response_norm(model, path)


def refuse_functional_activations(spec: LibraryModelSpec, trace: Trace) -> None:
    """Raise ConfigurationError if a model still calls activation functions.

    They are in the code of a module, where `model.activation` cannot replace them.
    """
    for path, module, function, _ in trace.calls:
        if function in ACTIVATION_FUNCTIONS and not _is_activation(module):
            where = f"{path or 'the model'} ({forward_of(module)})"
            rule = f"must be null for {spec.name}: {where} calls {function.__name__} itself"
            raise ConfigurationError("model.activation", spec.activation, rule)


def _replace_activations(model: nn.Module, spec: LibraryModelSpec, activation: str) -> None:
    replaced = 0
    # A list, since replacing children changes the modules while they are iterated.
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            # Its ReLU is a function call, so the module is rebuilt with an activation module.
            if forward_of(child) in BASIC_CONV:
                parts = OrderedDict(child.named_children(), activation=ACTIVATIONS[activation]())
                setattr(parent, name, nn.Sequential(parts))
            elif _is_activation(child):
                setattr(parent, name, ACTIVATIONS[activation]())
            else:
                continue
            replaced += 1
    if not replaced:
        rule = f"must be null for {spec.name}, which has no activation to replace"
        raise ConfigurationError("model.activation", activation, rule)


def _is_activation(module: nn.Module) -> bool:
    return type(module).__name__ in ACTIVATION_NAMES and not module._modules


def _set_dropout(model: nn.Module, spec: LibraryModelSpec, probability: float) -> None:
    """Set the rate of dropout layers and of functional dropout.

    Both libraries keep the latter in an attribute `drop_rate`.
    """
    found = False
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p, found = probability, True
        if isinstance(getattr(module, "drop_rate", None), int | float):
            module.drop_rate, found = probability, True  # type: ignore[assignment]
    if not found and probability > 0:
        rule = f"must be null or 0 for {spec.name}, which has no dropout layer"
        raise ConfigurationError("model.dropout", probability, rule)


def _append_local_response_norm(model: nn.Module, path: str) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    if path not in paths:
        close = ", ".join(difflib.get_close_matches(path, paths, n=5)) or ", ".join(paths[:5])
        rule = f"must be paths of the model's modules, such as {close}"
        raise ConfigurationError("model.local_response_norm_after", path, rule)
    layer = model.get_submodule(path)
    layers = OrderedDict(layer=layer, local_response_norm=nn.LocalResponseNorm(LOCAL_RESPONSE_SIZE))
    model.set_submodule(path, nn.Sequential(layers))
