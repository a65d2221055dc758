"""Factory of normalisation layers by mode."""

from collections import OrderedDict
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.jobspec import Norm
from trainer.norms.layers import channels_last

MOST_GROUPS = 32
"""Number of groups in Wu & He 2018 (Group Normalization), section 4.1."""
FEWEST_CHANNELS = 4
"""Channels in a group, where they can be had: on (N, C) input a group of one would be normalised to nothing."""
BATCH_NORMS: dict[int, type[_BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By number of dimensions of the input."""


def is_of_mode(layer: nn.Module, norm: Norm) -> bool:
    """Whether a normalisation layer already is what a mode asks for."""
    match norm:
        case Norm.NONE:
            return False
        case Norm.BATCH | Norm.SYNC:
            return type(layer) in BATCH_NORMS.values()
        case Norm.GROUP:
            return isinstance(layer, nn.GroupNorm) and layer.num_groups > 1
        case Norm.LAYER:
            return isinstance(layer, nn.LayerNorm) or (isinstance(layer, nn.GroupNorm) and layer.num_groups == 1)


def build_replacement(layer: nn.Module, norm: Norm, dimensions: int) -> nn.Module:
    """Build what takes the place of a normalisation layer: input and output are the layer's, (N, C, *) or (N, *, C).

    Channels, eps, momentum, scale and shift, running statistics, device and dtype are the layer's own where both have them. An
    activation and dropout inside the layer, as timm has them, stand behind its successor.

    Args:
        layer: any that `is_norm`.
        norm: `sync` gives torch's batch normalisation, to be converted with the whole model.
        dimensions: of the input.

    Raises:
        ValueError: the layer cannot be switched; the message says why.
    """
    successor = _build(layer, norm, dimensions)
    if channels_last(layer) and dimensions > 2 and norm in (Norm.BATCH, Norm.SYNC, Norm.GROUP):
        from torchvision.ops import Permute  # here, as it takes seconds to import

        to_first = [0, dimensions - 1, *range(1, dimensions - 1)]
        to_last = [0, *range(2, dimensions), 1]
        named = OrderedDict(to_channels_first=Permute(to_first), norm=successor, to_channels_last=Permute(to_last))
        successor = nn.Sequential(named)
    inside = {name: part for name, part in layer.named_children() if not isinstance(part, nn.Identity)}
    return nn.Sequential(OrderedDict(norm=successor, **inside)) if inside else successor


def count_groups(channels: int) -> int:
    """Return the largest number of equal groups up to 32, of at least 4 channels each; 1 where there is none."""
    most = max(1, min(MOST_GROUPS, channels // FEWEST_CHANNELS))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def makes_bias_redundant(norm: Norm) -> bool:
    """Whether a bias just before the layer is cancelled by its mean (Ioffe & Szegedy 2015, section 3.2)."""
    return norm in (Norm.BATCH, Norm.SYNC)


def _build(layer: nn.Module, norm: Norm, dimensions: int) -> nn.Module:
    """Build the normalisation alone.

    `layer` normalises all features of a sample together, with one scale and shift per channel; a channels-last layer is one that
    normalises the channels of each position, and stays so.
    """
    if norm is Norm.NONE:
        return nn.Identity()
    channels = _channels(layer)
    tensor = next(chain(layer.parameters(), layer.buffers()), None)
    place: dict[str, Any] = {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}
    eps = getattr(layer, "eps", None) or 1e-5
    affine = getattr(layer, "weight", None) is not None
    successor: nn.Module
    match norm:
        case Norm.BATCH | Norm.SYNC:
            if dimensions not in BATCH_NORMS:
                raise ValueError(f"its input must have 2 to 5 dimensions (got {dimensions})")
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
    """Take over the values that both have, and whether they are trained."""
    values = layer.state_dict()
    successor.load_state_dict({name: values[name] for name in successor.state_dict() if name in values}, strict=False)
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
                f"it normalises over the last {len(found)} dimensions, {tuple(found)}, and not over channels"
            )
        if found is not None:
            return int(found[0])
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)
