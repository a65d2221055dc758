"""Factory of normalisation layers by mode."""

from collections import OrderedDict
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.jobspec import Norm
from trainer.norms.layers import channels_last

MAX_GROUPS = 32
"""Number of groups in Wu & He 2018 (Group Normalization), section 4.1."""
MIN_GROUP_CHANNELS = 4
"""Minimum number of channels per group, if possible: a group of one channel would normalise (N, C) input to
zero.
"""
BATCH_NORMS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
"""Batch normalisation class by number of input dimensions."""


def is_of_mode(layer: nn.Module, norm: Norm) -> bool:
    """Return whether a normalisation layer already has the kind of a mode."""
    match norm:
        case Norm.NONE:
            return False
        case Norm.BATCH | Norm.SYNC:
            # Exact types: a subclass may compute something else, as those of timm do.
            return type(layer) in BATCH_NORMS.values()
        case Norm.GROUP:
            return isinstance(layer, nn.GroupNorm) and layer.num_groups > 1
        case Norm.LAYER:
            return isinstance(layer, nn.LayerNorm) or (
                isinstance(layer, nn.GroupNorm) and layer.num_groups == 1
            )


def build_replacement(layer: nn.Module, norm: Norm, dimensions: int) -> nn.Module:
    """Build the replacement of a normalisation layer.

    Input and output have the layout of the layer's, (N, C, *) or (N, *, C). Channels, eps, momentum, scale
    and shift, running statistics, device and dtype are kept if both layers have them. An activation and
    dropout inside the layer, as in timm, follow the replacement.

    Args:
        layer: layer for which `is_norm` holds.
        norm: mode; `sync` returns torch's batch normalisation, which is converted with the whole model.
        dimensions: number of dimensions of the input.

    Raises ValueError, with the reason, if the layer cannot be replaced.
    """
    successor = _build(layer, norm, dimensions)
    if channels_last(layer) and dimensions > 2 and norm in (Norm.BATCH, Norm.SYNC, Norm.GROUP):
        from torchvision.ops import Permute  # imported here: it takes seconds

        to_first = [0, dimensions - 1, *range(1, dimensions - 1)]
        to_last = [0, *range(2, dimensions), 1]
        named = OrderedDict(
            to_channels_first=Permute(to_first), norm=successor, to_channels_last=Permute(to_last)
        )
        successor = nn.Sequential(named)
    # Layers such as timm's BatchNormAct2d contain an activation and dropout as children.
    inside = {name: part for name, part in layer.named_children() if not isinstance(part, nn.Identity)}
    return nn.Sequential(OrderedDict(norm=successor, **inside)) if inside else successor


def count_groups(channels: int) -> int:
    """Return the largest number of equal groups, up to 32, of 4 channels or more.

    Returns 1 if there is none.
    """
    most = max(1, min(MAX_GROUPS, channels // MIN_GROUP_CHANNELS))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def makes_bias_redundant(norm: Norm) -> bool:
    """Return whether the layer's mean cancels a preceding bias.

    See Ioffe & Szegedy 2015, section 3.2.
    """
    return norm in (Norm.BATCH, Norm.SYNC)


def _build(layer: nn.Module, norm: Norm, dimensions: int) -> nn.Module:
    """Build the normalisation layer alone.

    Under `layer`, all features of a sample are normalised together, with one scale and shift per channel; a
    channels-last layer, which normalises the channels of each position, stays one.
    """
    if norm is Norm.NONE:
        return nn.Identity()
    channels = _channels(layer)
    # A layer without parameters and buffers has no device; the default is used.
    tensor = next(chain(layer.parameters(), layer.buffers()), None)
    place: dict[str, Any] = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    eps = getattr(layer, "eps", None) or 1e-5
    affine = getattr(layer, "weight", None) is not None
    successor: nn.Module
    match norm:
        case Norm.BATCH | Norm.SYNC:
            if dimensions not in BATCH_NORMS:
                raise ValueError(f"the input must have 2 to 5 dimensions (got {dimensions})")
            momentum = getattr(layer, "momentum", 0.1)
            tracks = layer.track_running_stats if isinstance(layer, _BatchNorm) else True
            successor = BATCH_NORMS[dimensions](channels, eps, momentum, affine, tracks, **place)
        case Norm.GROUP:
            successor = nn.GroupNorm(count_groups(channels), channels, eps, affine, **place)
        case Norm.LAYER if channels_last(layer):
            successor = nn.LayerNorm(channels, eps, affine, **place)
        case Norm.LAYER:
            successor = nn.GroupNorm(1, channels, eps, affine, **place)
    _inherit(successor, layer)
    return successor


def _inherit(successor: nn.Module, layer: nn.Module) -> None:
    """Copy the values that both layers have, and whether they are trained."""
    values = layer.state_dict()
    successor.load_state_dict(
        {name: values[name] for name in successor.state_dict() if name in values}, strict=False
    )
    # A frozen scale or shift stays frozen.
    trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    for name, parameter in successor.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    successor.train(layer.training)


def _channels(layer: nn.Module) -> int:
    for name in ("num_features", "num_channels", "normalized_shape"):
        found: Any = getattr(layer, name, None)
        if isinstance(found, int):
            return found
        if found is not None and len(found) > 1:
            raise ValueError(
                f"it normalises over the last {len(found)} dimensions, {tuple(found)}, not over channels"
            )
        if found is not None:
            return int(found[0])
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)
