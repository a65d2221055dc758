"""Loss of one step as a function of the weights, with its gradient."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data import Batch
from trainer.distributed import RankInfo


class Objective:
    """Mean cross-entropy over the global batch of a step.

    All workers call the same methods and get the same values. Every pass draws the random numbers of the
    training step, so that all passes evaluate one function with one dropout mask. A gradient is a flat
    vector: the full one, or with sharded weights this worker's part, which `products` takes into account.

    The passes run the model without DistributedDataParallel, whose buckets they would change.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Batch],
        batch_size: int,
        worker: RankInfo,
        autocast: AbstractContextManager[object],
        scale: float,
    ) -> None:
        """Set the batch.

        `parts` is this worker's share of a global batch of `batch_size`; `scale` is the loss scale of fp16 in
        backward.
        """
        self._model, self._parts, self._batch_size = model, parts, batch_size
        self._worker, self._autocast, self._scale = worker, autocast, scale
        self._is_sharded = _is_sharded(model)
        self._reshard()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self) -> None:
        """Run the model on each part without gradients, for its observers."""
        with leaving_no_trace(self._model), torch.no_grad():
            for part in self._parts:
                with self._autocast:
                    self._model(part.inputs)
        self._reshard()

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Return the mean loss in nats and its gradient.

        Collectives: those of the model, one for the gradient, one for the loss.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._worker.device)
        gradient = torch.zeros_like(self._weights())
        # FSDP averages gradients over workers; the sum is needed here.
        share = self._scale / self._batch_size * (self._worker.world_size if self._is_sharded else 1)
        with leaving_no_trace(self._model):
            for part in self._parts:
                with self._autocast:
                    loss = F.cross_entropy(self._model(part.inputs), part.labels, reduction="sum")
                loss_sum += loss.detach()
                gradient += self._differentiate(loss * share)
        if not self._is_sharded:
            self._worker.all_reduce(gradient)
        return float(self._worker.all_reduce(loss_sum)) / self._batch_size, gradient / self._scale

    @contextmanager
    def moved(self, direction: Tensor, length: float) -> Iterator[None]:
        """Set the weights to w - length · direction, and restore them exactly."""
        # A copy is restored instead of adding the step again, which would round.
        before = self._weights()
        try:
            self._set(before - length * direction)
            yield
        finally:
            self._set(before)

    def slice_of(self, vector: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the elements of a flat vector that belong to some parameters."""
        return torch.cat([vector[self._places[parameter]] for parameter in parameters])

    def masked(self, vector: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return `vector` with zeros for the elements of all other parameters."""
        result = torch.zeros_like(vector)
        for parameter in parameters:
            place = self._places[parameter]
            result[place] = vector[place]
        return result

    def dot_products(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Return scalar products of flat vectors, in float64.

        Collectives: one if weights are sharded.
        """
        # float64, since float32 sums over millions of elements lose digits.
        products = torch.stack([torch.dot(a.double(), b.double()) for a, b in pairs])
        if self._is_sharded:
            self._worker.all_reduce(products)
        return products.tolist()

    def _reshard(self) -> None:
        """Reshard the weights.

        A pass without backward, also in evaluation, leaves those of outer modules unsharded.
        """
        for module in self._model.modules():
            if _is_sharded(module):
                module.reshard()  # type: ignore[operator]

    def _differentiate(self, loss: Tensor) -> Tensor:
        if not self._is_sharded:
            # Unlike backward, this does not trigger the hooks of DistributedDataParallel.
            gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            return torch.cat([gradient.flatten() for gradient in gradients])
        loss.backward()  # type: ignore[no-untyped-call]
        own = [_own(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        gradient = torch.cat(own)
        for parameter in self.parameters:
            # The training step that follows accumulates into `grad`.
            parameter.grad = None
        return gradient

    @cached_property
    def _places(self) -> dict[nn.Parameter, slice]:
        places, start = {}, 0
        for parameter in self.parameters:
            places[parameter] = slice(start, start + _own(parameter).numel())
            start = places[parameter].stop
        return places

    def _weights(self) -> Tensor:
        return torch.cat([_own(parameter).detach().flatten() for parameter in self.parameters])

    @torch.no_grad()
    def _set(self, weights: Tensor) -> None:
        for parameter, place in self._places.items():
            own = _own(parameter)
            own.copy_(weights[place].view(own.shape))


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random states afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _is_sharded(module: nn.Module) -> bool:
    # isinstance(module, FSDPModule) would import torch.distributed.fsdp, which takes most of a second.
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _own(tensor: Tensor) -> Tensor:
    """Return this worker's part of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
