"""Data held in memory, on the worker's device."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.data.dataset import Batch
from trainer.data.digest import digest
from trainer.data.order import Indices, Order
from trainer.data.small import load_small
from trainer.spec import DigitsSpec, ImageTransformSpec, JobSpec, Mnist5kSpec


class InMemoryDataset:
    """A small dataset, indexed on the device; what the spec asks for beyond that is done batch by batch, in this process."""

    skipped_images = 0

    def __init__(
        self,
        spec: JobSpec,
        data: Mnist5kSpec | DigitsSpec,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        samples = load_small(data, device, dtype)
        labels = samples.train_labels.cpu().numpy()
        self._samples, self._device = samples, device
        self._order = Order(spec, rank, world_size, len(labels), labels)
        self._preparation: _Preparation | None = None
        if data.transform != ImageTransformSpec():
            self._preparation = _Preparation(data.transform, spec.seed, dtype)
        self.classes = int(labels.max()) + 1
        self.shape = tuple(self._test_batch(np.arange(1)).inputs.shape[1:])
        self.digest = digest(data.name, *(part.cpu().numpy().tobytes() for part in vars(samples).values()))

    def train(self, first_step: int) -> Iterator[list[Batch]]:
        """See Dataset."""
        step = first_step
        while True:
            yield [self._train_batch(step, indices) for indices in self._order.train(step)]
            step += 1

    def test(self) -> Iterator[Batch]:
        """See Dataset."""
        for indices in self._order.test(len(self._samples.test_labels)):
            yield self._test_batch(indices)

    def close(self) -> None:
        """See Dataset."""

    def _train_batch(self, step: int, indices: Indices) -> Batch:
        place = torch.from_numpy(indices).to(self._device)
        inputs = self._samples.train_inputs[place]
        if self._preparation is not None:
            inputs = self._preparation.train(inputs, step, indices)
        return Batch(inputs, self._samples.train_labels[place])

    def _test_batch(self, indices: Indices) -> Batch:
        place = torch.from_numpy(indices).to(self._device)
        inputs = self._samples.test_inputs[place]
        if self._preparation is not None:
            inputs = self._preparation.test(inputs)
        return Batch(inputs, self._samples.test_labels[place])


class _Preparation:
    """Transforms of whole batches, or image by image where they are random."""

    def __init__(self, spec: ImageTransformSpec, seed: int, dtype: torch.dtype) -> None:
        # Imports torchvision, which runs on small data do without.
        from trainer.data.transforms import PixelTransform

        self._spec, self._seed, self._dtype = spec, seed, dtype
        self._training, self._testing = PixelTransform(spec, training=True), PixelTransform(spec, training=False)

    def train(self, inputs: Tensor, step: int, indices: Indices) -> Tensor:
        from trainer.data.transforms import is_random, normalize

        if not is_random(self._spec) or not len(inputs):
            return self.test(inputs)
        images = [
            self._training.at_random(image, self._seed, step, int(index))
            for image, index in zip(inputs, indices, strict=True)
        ]
        return normalize(self._spec, torch.stack(images), self._dtype)

    def test(self, inputs: Tensor) -> Tensor:
        from trainer.data.transforms import normalize

        return normalize(self._spec, self._testing(inputs), self._dtype)
