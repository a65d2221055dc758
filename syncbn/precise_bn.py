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
    """Replace the running statistics by means over training batches: E[x] = E_B[μ_B], Var[x] = m/(m-1)·E_B[σ²_B].

    μ_B and σ²_B are those of a batch of all ranks. Batches, and ranks within them, may differ in size: a batch counts by
    its values n_B, as if each of them voted, and its own n_B/(n_B - 1) corrects its variance:

        mean = Σ_B n_B·μ_B / Σ_B n_B,   var = Σ_B n_B·(σ²_B·n_B/(n_B - 1)) / Σ_B n_B

    With equal sizes these are the paper's. The model runs in training mode without gradients and gets back the modes it
    had; of its parameters and buffers only running_mean, running_var and num_batches_tracked of its `SyncBatchNorm`
    layers change, and layers that keep no running statistics are left alone. num_batches_tracked becomes the number of
    batches with any value.

    Collectives: those of the model's forward passes. So each rank brings the same number of batches; one that has less
    data brings empty ones.

    Args:
        model: called as model(batch), or as model(*batch) for a tuple or list.
        batches: this rank's batches.

    Raises:
        InputError: there is no batch; nothing has changed.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 2, steps 8 to 12.
    """
    layers = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
    layers = [layer for layer in layers if layer.running_mean is not None]
    sums = {layer: _Sums(layer) for layer in layers}
    others = {
        buffer: buffer.clone() for buffer in model.buffers() if not any(buffer is own for own in _buffers_of(layers))
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
            raise InputError("there is no batch to take population statistics from")
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
        """Set the running statistics; a layer that met no value keeps them."""
        layer, count = self._layer, self._count
        if not isinstance(count, Tensor) or not count:
            return
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        layer.running_mean.copy_(self._mean / count)
        layer.running_var.copy_(self._variance / count)
        layer.num_batches_tracked.copy_(torch.as_tensor(self._batches))
