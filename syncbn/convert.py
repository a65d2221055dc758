"""Conversion of batch normalisation layers to synchronised ones and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import isclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.errors import ConversionError, InputError
from syncbn.module import SyncBatchNorm
from syncbn.norm_act import SyncBatchNormAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ModuleType = TypeVar("ModuleType", bound=nn.Module)

LOCAL = "_class_when_reverted"
MAX_MESSAGE_CHARACTERS = 500
MAX_NAME_CHARACTERS = 120


class BatchNorm(_BatchNorm):
    """Batch normalisation in one process, for inputs (N, C, *) of any dimensionality."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - named as in the base class
        if input.dim() < 2:
            raise InputError(f"input: must have two or more dimensions, (N, C, *) (got {input.dim()})")


_conversions: dict[type[nn.Module], tuple[type[SyncBatchNorm], type[_BatchNorm]]] = {}
"""Class of a layer, its class after conversion, and that after conversion and reversal."""


def register_conversion(
    type: type[_BatchNorm],  # noqa: A002 - the word of the concept
    to_sync: type[SyncBatchNorm],
    to_local: type[_BatchNorm] | None = None,
) -> None:
    """Register the classes that layers of a class get by conversion and by reversal.

    Conversion assigns `to_sync` to the `__class__` of each layer whose class is exactly `type`, and reversal
    assigns `to_local`. Nothing else of a layer changes, so `to_sync` must be able to work with the attributes
    of `type`. Its forward runs the synchronised normalisation by `super().forward`, and adds what `type` does
    in addition to normalising:

        class NormAct(nn.BatchNorm2d):
            def forward(self, input):
                return super().forward(input).relu()

        class SyncNormAct(SyncBatchNorm):
            def forward(self, input, mask=None):
                return super().forward(input, mask).relu()

        register_conversion(NormAct, SyncNormAct, NormAct)

    Register in the module that defines the classes, so that a process which unpickles a converted model has
    the registration too. A second registration of a class replaces the first. The layers of torch and timm
    are registered already.

    Args:
        type: class of the layers to convert; its subclasses are not included.
        to_sync: class of a converted layer; no class of a layer to convert.
        to_local: class of a reverted layer; None means `type`.

    Raises:
        ConversionError: a class is of the wrong kind.
    """
    local = type if to_local is None else to_local
    if not isclass(to_sync) or not issubclass(to_sync, SyncBatchNorm):
        raise ConversionError(f"to_sync: must be a subclass of SyncBatchNorm (got {to_sync!r})")
    for name, kind in {"type": type, "to_local": local}.items():
        if not isclass(kind) or not issubclass(kind, _BatchNorm) or issubclass(kind, SyncBatchNorm):
            raise ConversionError(
                f"{name}: must be a subclass of torch's batch normalisation and not of SyncBatchNorm "
                f"(got {kind!r})"
            )
    _conversions[type] = to_sync, local


for _kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm):
    register_conversion(_kind, SyncBatchNorm)
register_conversion(nn.SyncBatchNorm, SyncBatchNorm, BatchNorm)


def _register_timm() -> None:
    """Register timm's layers if timm is imported, as it is where a model has them."""
    timm = sys.modules.get("timm.layers.norm_act")
    if timm is not None:
        for kind in (timm.BatchNormAct2d, timm.SyncBatchNormAct):
            _conversions.setdefault(kind, (SyncBatchNormAct, timm.BatchNormAct2d))


def convert_sync_batchnorm(module: ModuleType, process_group: ProcessGroup | None = None) -> ModuleType:
    """Convert all batch normalisation layers of a module to `SyncBatchNorm`, in place.

    The layers are torch.nn.BatchNorm1d, BatchNorm2d, BatchNorm3d and SyncBatchNorm, `BatchNorm`, timm's
    BatchNormAct2d and SyncBatchNormAct, and those of `register_conversion`. Each layer remains the same
    object and only its class changes. Parameters, buffers, hooks, flags and other attributes are kept,
    references such as those of optimizers remain valid, and a layer used in several places remains one layer.
    A converted layer accepts any (N, C, *) input.

    Unchanged are layers of this package, including their process group, and modules that are not batch
    normalisation, such as InstanceNorm, or use no batch, such as FrozenBatchNorm2d of torchvision. A
    torch.nn.SyncBatchNorm with a process group keeps it.

    Collectives: none.

    Args:
        module: a model, or a single layer.
        process_group: ranks to synchronise over; None means all ranks.

    Returns:
        The same module.

    Raises:
        ConversionError: the module contains lazy layers without a number of channels, or subclasses that are
            not registered, whose behaviour would be lost. The error names the first of them, and nothing is
            converted.
    """
    _register_timm()
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
    }
    remedy = "register its class by syncbn.register_conversion, or replace it by hand"
    refused = {path: layer for path, layer in layers.items() if type(layer) not in _conversions}
    _refuse("convert", refused, remedy)
    for path, layer in layers.items():
        # torch.nn.SyncBatchNorm has the group as an attribute; our class has a property of that name.
        own_group = vars(layer).pop("process_group", None)
        to_sync, vars(layer)[LOCAL] = _conversions[type(layer)]
        layer.__class__ = to_sync
        cast(SyncBatchNorm, layer)._init_collectives(path, process_group if own_group is None else own_group)
    return module


SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)


def revert_sync_batchnorm(module: ModuleType) -> ModuleType:
    """Undo `convert_sync_batchnorm` in place: each layer gets its former class.

    A layer that was constructed as `SyncBatchNorm` or converted from torch.nn.SyncBatchNorm becomes a
    `BatchNorm`, which accepts inputs of any number of dimensions; timm's SyncBatchNormAct becomes its
    BatchNormAct2d.

    Collectives: none.

    Args:
        module: a model, or a single layer.

    Returns:
        The same module.

    Raises:
        ConversionError: the module contains subclasses of `SyncBatchNorm` that no conversion has made, whose
            behaviour would be lost. The error names the first of them, and nothing is reverted.
    """
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, SyncBatchNorm)}
    refused = {path: layer for path, layer in layers.items() if not _can_revert(layer)}
    _refuse("revert", refused, "replace it by hand")
    for layer in layers.values():
        local = vars(layer).pop(LOCAL, BatchNorm)
        layer._drop_collectives()
        cast(nn.Module, layer).__class__ = local
    return module


def _can_revert(layer: SyncBatchNorm) -> bool:
    converted = {SyncBatchNormAct, *(to_sync for to_sync, _ in _conversions.values())}
    return type(layer) is SyncBatchNorm or (LOCAL in vars(layer) and type(layer) in converted)


def _refuse(action: str, layers: Mapping[str, nn.Module], remedy: str) -> None:
    """Raise an error that names the first of the layers, if there are layers."""
    reasons = [_reason(path, layer, remedy) for path, layer in layers.items()]
    if not reasons:
        return
    message = f"cannot {action} {reasons[0]}"
    for number, reason in enumerate(reasons[1:], start=1):
        rest = f"; and {len(reasons) - number} more"
        if len(message) + len(reason) + len("; ") + len(rest) > MAX_MESSAGE_CHARACTERS:
            message += rest
            break
        message += f"; {reason}"
    raise ConversionError(message)


def _reason(path: str, layer: nn.Module, remedy: str) -> str:
    """Return why a layer cannot be converted or reverted, and what to do."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    name = f"{_shorten(path) or 'the module itself'} ({_shorten(kind)})"
    if isinstance(layer, LazyModuleMixin):
        return f"{name}: its number of channels is unknown; run the model on one batch first"
    # Compared by name, so that torch.distributed.fsdp is not imported.
    if any(base.__name__ == "FSDPModule" for base in type(layer).__mro__):
        return f"{name}: a sharded layer; convert and revert models before fully_shard"
    return f"{name}: a subclass whose behaviour would be lost; {remedy}"


def _shorten(name: str) -> str:
    """Return a name, without its middle where it is longer than the limit."""
    half = MAX_NAME_CHARACTERS // 2 - 1
    return name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:half]}…{name[-half:]}"
