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
from trainer.models.surgery import alter

COLOURS = 3
"""Channels that torchvision's models take."""
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""Models of torchvision that return more than logits in training by default, and have an argument for initialisation."""


def build_library_model(spec: LibraryModelSpec, shape: Sequence[int], classes: int) -> nn.Module:
    """Build a model by the library's own builder, and change in it what the spec asks for.

    Raises ConfigurationError for a name that the library does not know, and for what its builder refuses.
    """
    library, _, name = spec.name.partition(":")
    if name not in (names := _names(library)):
        close = ", ".join(difflib.get_close_matches(name, names, n=5)) or "none"
        raise ConfigurationError("model.name", spec.name, f"must be a model of {library}; similar names: {close}")
    try:
        model = _build(library, name, spec.arguments, shape[0], classes)
    except Exception as error:  # whatever a builder makes of arguments that it does not take
        takes = f"must be arguments of the builder of {spec.name}: {type(error).__name__}: {error}"
        raise ConfigurationError("model.arguments", spec.arguments, takes) from error
    alter(model, spec)
    return model


def _names(library: str) -> list[str]:
    if library == "timm":
        # The latter are names with that of trained weights behind a dot, which choose a network's variant.
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
        _take_channels(model, channels)
    return model


def _take_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one of another number of input channels, whose weights have the same spread."""
    first = next(module for module in model.modules() if isinstance(module, _ConvNd))
    weight = first.weight.detach()
    first.in_channels = channels
    first.weight = nn.Parameter(torch.randn(len(weight), channels, *weight.shape[2:]) * weight.std())
