"""Loss of one step as a function of the weights, with gradient."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.data import Batch
from trainer.distributed import RankInfo
from trainer.training.evaluate import sum_over_workers


class Objective:
    """Mean cross-entropy over a step's global batch; all workers call the same methods, and get the same values.

    Every pass draws the random numbers that the training step will, so all of them see one function, with one dropout. A
    gradient is one flat vector: the whole of it, or where weights are sharded this worker's part; `products` knows the difference.

    The passes run the model itself, not its wrapping by DistributedDataParallel, whose buckets they would disturb.
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
        """`batch_size` is that of the global batch, `parts` this worker's share; `scale` is fp16's factor on losses in backward."""
        self._model, self._parts, self._batch_size = model, parts, batch_size
        self._worker, self._autocast, self._scale = worker, autocast, scale
        self._is_sharded = isinstance(model, FSDPModule)
        self._reshard()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self) -> None:
        """Run the model on each part without gradients, for who watches it."""
        with leaving_no_trace(self._model), torch.no_grad():
            for part in self._parts:
                with self._autocast:
                    self._model(part.inputs)
        self._reshard()

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Return the mean loss in nats, and its gradient. Collectives: the model's own, one of the gradient, one of the loss."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._worker.device)
        gradient = torch.zeros_like(self._weights())
        # FSDP averages over workers where we want the sum.
        share = self._scale / self._batch_size * (self._worker.world_size if self._is_sharded else 1)
        with leaving_no_trace(self._model):
            for part in self._parts:
                with self._autocast:
                    loss = F.cross_entropy(self._model(part.inputs), part.labels, reduction="sum")
                loss_sum += loss.detach()
                gradient += self._differentiate(loss * share)
        if not self._is_sharded:
            sum_over_workers(gradient, self._worker.world_size)
        return float(sum_over_workers(loss_sum, self._worker.world_size)) / self._batch_size, gradient / self._scale

    @contextmanager
    def moved(self, direction: Tensor, length: float) -> Iterator[None]:
        """Within, the weights are w - length · direction; afterwards they have the bits that they had."""
        before = self._weights()
        try:
            self._set(before - length * direction)
            yield
        finally:
            self._set(before)

    def piece(self, vector: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return what of a flat vector belongs to some parameters."""
        return torch.cat([vector[self._places[parameter]] for parameter in parameters])

    def only(self, vector: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return `vector` with zeros in place of what belongs to other parameters."""
        result = torch.zeros_like(vector)
        for parameter in parameters:
            place = self._places[parameter]
            result[place] = vector[place]
        return result

    def products(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Return scalar products of flat vectors, in float64. Collectives: one where weights are sharded."""
        products = torch.stack([torch.dot(a.double(), b.double()) for a, b in pairs])
        if self._is_sharded:
            dist.all_reduce(products)
        return products.tolist()

    def _reshard(self) -> None:
        """Give each worker its shards back: a pass without backward, also of evaluation, leaves outer weights whole."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _differentiate(self, loss: Tensor) -> Tensor:
        if not self._is_sharded:
            # Leaves `.grad` alone, and so the hooks by which DistributedDataParallel would reduce it.
            gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            return torch.cat([gradient.flatten() for gradient in gradients])
        loss.backward()  # type: ignore[no-untyped-call]
        own = [_own(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        gradient = torch.cat(own)
        for parameter in self.parameters:
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
    """Give buffers and random numbers back, at the end, what they were."""
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


def _own(tensor: Tensor) -> Tensor:
    """Return this worker's part of a tensor that is sharded; the whole of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
