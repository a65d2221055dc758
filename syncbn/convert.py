"""Conversion of a model's batch normalisation layers into synchronised ones, without loss."""

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
    """Batch normalisation of one process's data, of shape (N, C, *) with any number of trailing dimensions."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - named as in the base class
        if input.dim() < 2:
            raise InputError(f"the input has {input.dim()} dimensions; taken are two or more, (N, C, *)")


CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm, nn.SyncBatchNorm)


def convert_sync_batchnorm(module: ModuleType, process_group: ProcessGroup | None = None) -> ModuleType:
    """Make every torch.nn.BatchNorm1d, 2d, 3d and SyncBatchNorm in a module a `SyncBatchNorm`, in place.

    Each layer stays the object that it is and changes its class alone. So parameters and buffers are the same objects,
    training and requires_grad flags, hooks and any other attribute are kept, optimisers and other references stay
    valid, and a layer used in several places is still one layer. A converted layer takes any (N, C, *) input.

    Left as they are: layers already synchronised by this package, together with their process group, and everything
    that is not batch normalisation, such as InstanceNorm. A torch.nn.SyncBatchNorm that has a process group keeps it.

    Collectives: none.

    Args:
        module: a model, or a single layer.
        process_group: ranks to synchronise over; None means all of them.

    Returns:
        The module given; if it is itself a batch normalisation layer, it is now a `SyncBatchNorm`.

    Raises:
        ConversionError: the module contains lazy layers, whose number of channels is not known yet, or subclasses,
            whose own behaviour would be lost. It names all of them, and nothing has been converted.
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
        # The class of a torch.nn.SyncBatchNorm goes with the group that it kept as an attribute; ours has a property.
        own_group = vars(layer).pop("process_group", None)
        vars(layer)[ORIGINAL] = type(layer)
        layer.__class__ = SyncBatchNorm
        cast(SyncBatchNorm, layer)._init_collectives(path, process_group if own_group is None else own_group)
    return module


def revert_sync_batchnorm(module: ModuleType) -> ModuleType:
    """Undo `convert_sync_batchnorm` in place: each layer gets back the class that it had, and keeps all else.

    A layer that was made a `SyncBatchNorm`, and so never was another, becomes a `BatchNorm` that takes inputs of any
    dimension like itself. A layer that was a torch.nn.SyncBatchNorm becomes a torch.nn.BatchNorm of that kind too, since
    to be rid of synchronisation is the point.

    Collectives: none.

    Args:
        module: a model, or a single layer.

    Returns:
        The module given.

    Raises:
        ConversionError: the module contains subclasses of `SyncBatchNorm`, whose own behaviour would be lost. It names all of
            them, and nothing has been reverted.
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
    """Say which layer cannot be converted, and what to do about it."""
    name = f"{path or 'the module itself'} ({type(layer).__module__}.{type(layer).__qualname__})"
    if isinstance(layer, LazyModuleMixin):
        return f"{name}: its number of channels is not known yet; run the model on one batch first"
    return f"{name}: a subclass whose own behaviour would be lost; replace it by hand"
