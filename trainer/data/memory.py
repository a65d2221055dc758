"""Small datasets in memory, on the worker's device."""

from collections.abc import Generator, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainer.data.builtin import load_small
from trainer.data.dataset import Batch
from trainer.data.sampler import DistributedBatchSampler, Indices
from trainer.data.transforms import PixelTransform, is_random, normalize
from trainer.jobspec import DigitsSpec, ImageTransformSpec, JobSpec, Mnist5kSpec


class InMemoryDataset:
    """Dataset on the device, transformed batch by batch in this process."""

    class_names: Sequence[str] = ()
    skipped_images = frozenset[str]()

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
        self._samples, self._device, self._dtype = samples, device, dtype
        self._order = DistributedBatchSampler(spec, rank, world_size, len(labels), labels)
        self._seed, self._transform = spec.seed, data.transform
        self._is_plain, self._is_random = data.transform == ImageTransformSpec(), is_random(data.transform)
        self.classes, self.digest = int(labels.max()) + 1, samples.digest
        self.shape = tuple(self._test_batch(np.arange(1)).inputs.shape[1:])

    @cached_property
    def _train_pixels(self) -> PixelTransform:
        return PixelTransform(self._transform, training=True)

    @cached_property
    def _test_pixels(self) -> PixelTransform:
        return PixelTransform(self._transform, training=False)

    def train(self, first_step: int) -> Generator[list[Batch]]:
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
        place = torch.from_numpy(indices).to(self._device)  # (n,) int64
        inputs, labels = self._samples.train_inputs[place], self._samples.train_labels[place]
        if not self._is_random or not len(indices):
            return Batch(self._prepare(inputs), labels)
        images = [
            self._train_pixels.at_random(image, self._seed, step, int(index))
            for image, index in zip(inputs, indices, strict=True)
        ]
        return Batch(normalize(self._transform, torch.stack(images), self._dtype), labels)

    def _test_batch(self, indices: Indices) -> Batch:
        place = torch.from_numpy(indices).to(self._device)
        return Batch(self._prepare(self._samples.test_inputs[place]), self._samples.test_labels[place])

    def _prepare(self, inputs: Tensor) -> Tensor:
        """Apply the deterministic transforms; skip them if there are none.

        Steps may take only a millisecond.
        """
        if self._is_plain:
            return inputs
        return normalize(self._transform, self._test_pixels(inputs), self._dtype)
