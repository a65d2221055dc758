"""Conversion of batch normalisation layers to synchronised ones and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.errors import ConversionError, InputError
from syncbn.module import SyncBatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ModuleType = TypeVar("ModuleType", bound=nn.Module)

ORIGINAL = "_class_before_conversion"


class BatchNorm(_BatchNorm):
    """Batch normalisation over the data of one process, for inputs (N, C, *) of any number of dimensions."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - named as in the base class
        if input.dim() < 2:
            raise InputError(f"input: must have two or more dimensions, (N, C, *) (got {input.dim()})")


CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm, nn.SyncBatchNorm)


def convert_sync_batchnorm(module: ModuleType, process_group: ProcessGroup | None = None) -> ModuleType:
    """Convert every torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm of a module to `SyncBatchNorm`, in place.

    Each layer remains the same object and only its class changes. Parameters, buffers, hooks, flags and other attributes are
    kept, references such as those of optimizers remain valid, and a layer used in several places remains one layer. A
    converted layer accepts any (N, C, *) input.

    Unchanged are layers of this package, including their process group, and modules that are not batch normalisation, such as
    InstanceNorm. A torch.nn.SyncBatchNorm with a process group keeps it.

    Collectives: none.

    Args:
        module: a model, or a single layer.
        process_group: ranks to synchronise over; None means all ranks.

    Returns:
        The same module.

    Raises:
        ConversionError: the module contains lazy layers without a number of channels, or subclasses, whose behaviour would be
            lost. The error names all of them, and nothing is converted.
    """
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
    }
    refusals = [_refusal(path, layer) for path, layer in layers.items() if type(layer) not in CONVERTIBLE]
    if refusals:
        raise ConversionError("cannot convert " + "; ".join(refusals))
    for path, layer in layers.items():
        # torch.nn.SyncBatchNorm has the group as an attribute; our class has a property of that name.
        own_group = vars(layer).pop("process_group", None)
        vars(layer)[ORIGINAL] = type(layer)
        layer.__class__ = SyncBatchNorm
        cast(SyncBatchNorm, layer)._init_collectives(path, process_group if own_group is None else own_group)
    return module


def revert_sync_batchnorm(module: ModuleType) -> ModuleType:
    """Undo `convert_sync_batchnorm` in place: each layer gets its former class.

    A layer that was constructed as `SyncBatchNorm` or converted from torch.nn.SyncBatchNorm becomes a `BatchNorm`, which accepts
    inputs of any number of dimensions.

    Collectives: none.

    Args:
        module: a model, or a single layer.

    Returns:
        The same module.

    Raises:
        ConversionError: the module contains subclasses of `SyncBatchNorm`, whose behaviour would be lost. The error names all of
            them, and nothing is reverted.
    """
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, SyncBatchNorm)}
    refusals = [_refusal(path, layer) for path, layer in layers.items() if type(layer) is not SyncBatchNorm]
    if refusals:
        raise ConversionError("cannot revert " + "; ".join(refusals))
    for layer in layers.values():
        original = vars(layer).pop(ORIGINAL, nn.SyncBatchNorm)
        layer._drop_collectives()
        cast(nn.Module, layer).__class__ = BatchNorm if original is nn.SyncBatchNorm else original
    return module


def _refusal(path: str, layer: nn.Module) -> str:
    """Return why a layer cannot be converted, and what to do."""
    name = f"{path or 'the module itself'} ({type(layer).__module__}.{type(layer).__qualname__})"
    if isinstance(layer, LazyModuleMixin):
        return f"{name}: its number of channels is not known; run the model on one batch first"
    return f"{name}: a subclass whose behaviour would be lost; replace it by hand"
