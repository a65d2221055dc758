"""Recognition of normalisation layers and their channel dimension."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

CHANNELS_FIRST = frozenset(
    {
        "syncbn.module.SyncBatchNorm",
        "timm.layers.norm.GroupNorm",
        "timm.layers.norm.GroupNorm1",
        "timm.layers.norm.LayerNorm2d",
        "timm.layers.norm.LayerNorm2dFp32",
        "timm.layers.norm.LayerNormExp2d",
        "timm.layers.norm.RmsNorm2d",
        "timm.layers.norm.RmsNorm2dFp32",
        "timm.layers.norm.SimpleNorm2d",
        "timm.layers.norm.SimpleNorm2dFp32",
        "timm.layers.norm_act.BatchNormAct2d",
        "timm.layers.norm_act.FrozenBatchNormAct2d",
        "timm.layers.norm_act.GroupNorm1Act",
        "timm.layers.norm_act.GroupNormAct",
        "timm.layers.norm_act.LayerNormAct2d",
        "timm.layers.norm_act.LayerNormAct2dFp32",
        "timm.layers.norm_act.RmsNormAct2d",
        "timm.layers.norm_act.RmsNormAct2dFp32",
        "timm.layers.norm_act.SyncBatchNormAct",
        "torch.nn.modules.batchnorm.SyncBatchNorm",
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.instancenorm._InstanceNorm",
        "torch.nn.modules.normalization.GroupNorm",
        "torchvision.models.convnext.LayerNorm2d",
        "torchvision.ops.misc.FrozenBatchNorm2d",
    }
)
"""Classes whose `forward` takes (N, C, *)."""
CHANNELS_LAST = frozenset(
    {
        "timm.layers.norm.LayerNorm",
        "timm.layers.norm.LayerNormFp32",
        "timm.layers.norm.RmsNorm",
        "timm.layers.norm.RmsNormFp32",
        "timm.layers.norm.SimpleNorm",
        "timm.layers.norm.SimpleNormFp32",
        "timm.layers.norm_act.LayerNormAct",
        "timm.layers.norm_act.LayerNormActFp32",
        "timm.layers.norm_act.RmsNormAct",
        "timm.layers.norm_act.RmsNormActFp32",
        "torch.nn.modules.normalization.LayerNorm",
        "torch.nn.modules.normalization.RMSNorm",
    }
)
"""Classes whose `forward` takes (N, *, C)."""
OTHERS = frozenset({"GlobalResponseNorm", "LocalResponseNorm"})
"""Competition between channels rather than normalisation: part of the architecture in every mode."""
BASES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
NAME = re.compile(r"norm(?!al)|abn$", re.IGNORECASE)
"""Names of normalisation layers; `normal`, as in `Normalize` or `NormalCell`, is excluded."""


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer that can be replaced."""
    return forward_of(module) in CHANNELS_FIRST | CHANNELS_LAST


def is_unknown_norm(path: str, module: nn.Module) -> bool:
    """Return whether a module is an unsupported normalisation layer.

    It is recognised by its base class or its name. Modules that only contain others (`ConvNormAct`), and
    parametrisations of weights (`_WeightNorm`), are not normalisation layers.
    """
    if is_norm(module):
        return False
    if isinstance(module, BASES):
        return True
    # The name is the only sign of norms written by users; containers and parametrisations have such names
    # too, but hold no values of their own.
    name = type(module).__name__
    holds_values = bool(module._parameters or module._buffers) or not module._modules
    return (
        bool(NAME.search(name))
        and holds_values
        and name not in OTHERS
        and "parametrizations" not in path.split(".")
    )


def channels_last(layer: nn.Module) -> bool:
    """Return whether a normalisation layer takes (N, *, C) instead of (N, C, *)."""
    return forward_of(layer) in CHANNELS_LAST


def forward_of(module: nn.Module) -> str:
    """Return the full name of the class that defines a module's `forward`.

    It identifies the computation, independently of the name of the subclass.
    """
    # A subclass without its own forward computes the same as its base.
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return f"{owner.__module__}.{owner.__qualname__}"
