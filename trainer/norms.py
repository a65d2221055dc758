"""Normalisation layers by mode: the one place where a mode is turned into a module."""

from torch import nn

from syncbn import SyncBatchNorm
from trainer.spec import Norm

MOST_GROUPS = 32
"""Number of groups in Wu & He 2018 (Group Normalization), section 4.1."""
FEWEST_CHANNELS = 4
"""Channels in a group, where they can be had: on (N, C) input a group of one would be normalised to nothing."""


def build_norm(norm: Norm, channels: int) -> nn.Module:
    """Build the normalisation of `channels` features: input and output (N, C, *).

    `group` takes as many equal groups as it can, up to 32, of at least 4 channels each; `layer` normalises all features of a sample
    together, with one scale and shift per channel.
    """
    match norm:
        case Norm.NONE:
            return nn.Identity()
        case Norm.BATCH:
            return nn.BatchNorm1d(channels)
        case Norm.SYNC:
            return SyncBatchNorm(channels)
        case Norm.GROUP:
            most = max(1, min(MOST_GROUPS, channels // FEWEST_CHANNELS))
            return nn.GroupNorm(max(n for n in range(1, most + 1) if channels % n == 0), channels)
        case Norm.LAYER:
            return nn.GroupNorm(1, channels)


def makes_bias_redundant(norm: Norm) -> bool:
    """Whether a bias just before the layer is cancelled by its mean (Ioffe & Szegedy 2015, section 3.2)."""
    return norm in (Norm.BATCH, Norm.SYNC)
