"""Population statistics (precise BN), Algorithm 2 of the paper, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.errors import InputError
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments


@torch.no_grad()
def update_population_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace running statistics by means over training batches.

    In the paper E[x] = E_B[μ_B] and Var[x] = m/(m-1)·E_B[σ²_B], with μ_B and σ²_B of a batch over all ranks.
    Here batches, and ranks within them, may differ in size: a batch is weighted by its number of values n_B,
    and n_B/(n_B - 1) corrects its variance:

        mean = Σ_B n_B·μ_B / Σ_B n_B,   var = Σ_B n_B·(σ²_B·n_B/(n_B - 1)) / Σ_B n_B

    With equal sizes these are the formulas of the paper. The model runs in training mode without gradients,
    and its modes are restored. Of its parameters and buffers, only running_mean, running_var and
    num_batches_tracked of `SyncBatchNorm` layers change; layers without running statistics are ignored.
    num_batches_tracked becomes the number of batches with values.

    Collectives: those of the model's forward passes. Every rank must pass the same number of batches; a rank
    with less data passes empty ones.

    Args:
        model: called as model(batch), or as model(*batch) for a tuple or list.
        batches: batches of this rank.

    Raises:
        InputError: there is no batch; nothing has changed.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 2, steps 8 to 12.
    """
    layers = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
    layers = [layer for layer in layers if layer.running_mean is not None]
    sums = {layer: _Sums(layer) for layer in layers}
    others = {
        buffer: buffer.clone()
        for buffer in model.buffers()
        if not any(buffer is own for own in _buffers_of(layers))
    }
    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_stats_hook(sums[layer].add) for layer in layers]
    before = {buffer: buffer.clone() for buffer in _buffers_of(layers)}
    count, done = 0, False
    try:
        model.train()
        for count, batch in enumerate(batches, start=1):  # noqa: B007 - its last value is asked for
            model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        if count == 0:
            raise InputError("batches: must have at least one batch (got none)")
        done = True
    finally:
        for handle in handles:
            handle()
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in [*others.items(), *before.items()]:
            buffer.copy_(value)
        if done:
            for layer_sums in sums.values():
                layer_sums.write()


def _buffers_of(layers: list[SyncBatchNorm]) -> list[Tensor]:
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


class _Sums:
    """Sums over a layer's batches, each weighted by its values."""

    def __init__(self, layer: SyncBatchNorm) -> None:
        self._layer = layer
        self._batches: Tensor | float = 0.0
        self._count: Tensor | float = 0.0
        self._mean: Tensor | float = 0.0
        self._variance: Tensor | float = 0.0

    def add(self, moments: Moments) -> None:
        self._batches = self._batches + (moments.count > 0)
        self._count = self._count + moments.count
        self._mean = self._mean + moments.count * moments.mean
        self._variance = self._variance + moments.count * moments.unbiased_variance

    def write(self) -> None:
        """Set the running statistics; a layer without values keeps them."""
        layer, count = self._layer, self._count
        if not isinstance(count, Tensor) or not count:
            return
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        layer.running_mean.copy_(self._mean / count)
        layer.running_var.copy_(self._variance / count)
        layer.num_batches_tracked.copy_(torch.as_tensor(self._batches))
