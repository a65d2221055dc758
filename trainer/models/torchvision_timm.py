"""Models of torchvision and timm without pretrained weights."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision.models
from torch import nn
from torch.nn.modules.conv import _ConvNd

from trainer.errors import ConfigurationError
from trainer.jobspec import LibraryModelSpec
from trainer.models.surgery import modify

COLOURS = 3
"""Input channels of torchvision's models."""
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""Models of torchvision that by default return more than logits in training, and that have an argument for
initialisation.
"""


def build_library_model(spec: LibraryModelSpec, shape: Sequence[int], classes: int) -> nn.Module:
    """Build a model by the library's builder, and change it by the specification.

    Raises ConfigurationError for an unknown name, and for arguments that the builder rejects.
    """
    library, _, name = spec.name.partition(":")
    if name not in (names := _names(library)):
        close = ", ".join(difflib.get_close_matches(name, names, n=5)) or "none"
        raise ConfigurationError(
            "model.name", spec.name, f"must be a model of {library}; similar names: {close}"
        )
    try:
        model = _build(library, name, spec.arguments, shape[0], classes)
    except Exception as error:  # builders raise errors of any class for invalid arguments
        rule = f"must be arguments of the builder of {spec.name}: {type(error).__name__}: {error}"
        raise ConfigurationError("model.arguments", spec.arguments, rule) from error
    modify(model, spec)
    return model


def _names(library: str) -> list[str]:
    if library == "timm":
        # The latter have the name of trained weights after a dot, which selects a variant of the network.
        return [*timm.list_models(), *timm.list_models(pretrained=True)]
    return list(torchvision.models.list_models(module=torchvision.models))


def _build(library: str, name: str, arguments: dict[str, Any], channels: int, classes: int) -> nn.Module:
    model: nn.Module
    if library == "timm":
        model = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **arguments)
        return model
    defaults = {"aux_logits": False, "init_weights": True} if name in WITH_AUXILIARY_HEADS else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=classes, **(defaults | arguments))
    if channels != COLOURS:
        _set_input_channels(model, channels)
    return model


def _set_input_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution for another number of input channels.

    The new weights have the same standard deviation.
    """
    first = next(module for module in model.modules() if isinstance(module, _ConvNd))
    weight = first.weight.detach()
    first.in_channels = channels
    first.weight = nn.Parameter(torch.randn(len(weight), channels, *weight.shape[2:]) * weight.std())
