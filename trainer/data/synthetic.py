"""Random inputs of any shape, to measure throughput."""

import math
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.data.cache import digest
from trainer.data.dataset import Batch
from trainer.data.sampler import DistributedBatchSampler, Indices
from trainer.jobspec import JobSpec, SyntheticSpec

POOL_SAMPLES = 1_024
POOL_VALUES = 2**25
"""Limits of the pool of samples, which are used repeatedly: number of samples, and of values in all (128 MiB
in float32).
"""

MEANS, TRAINING, TESTING = range(3)


class SyntheticDataset:
    """Dataset whose sample i is element i % pool of a pool of random samples.

    Each sample is a Gaussian of variance 1 around the mean of its class, which is N(0, 1) too. Samples come
    in index order: they are random already, and shuffling up to 10⁹ of them would be slow.
    """

    class_names: Sequence[str] = ()
    skipped_images = frozenset[str]()

    def __init__(
        self,
        spec: JobSpec,
        data: SyntheticSpec,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.classes = tuple(data.shape), data.classes
        self.digest = digest(data.model_dump_json())
        self._test_samples, self._device = data.test_samples, device
        pool = max(1, min(POOL_SAMPLES, POOL_VALUES // math.prod(self.shape)))
        self._training = self._draw(TRAINING, min(pool, data.train_samples), dtype)
        self._testing = self._draw(TESTING, min(pool, data.test_samples), dtype)
        labels = None
        if spec.data_partition == "by_label":
            labels = np.arange(data.train_samples) % len(self._training.labels) % data.classes
        self._order = DistributedBatchSampler(
            spec, rank, world_size, data.train_samples, labels, shuffle=False
        )

    def train(self, first_step: int) -> Generator[list[Batch]]:
        """See Dataset."""
        step = first_step
        while True:
            yield [self._take(self._training, indices) for indices in self._order.train(step)]
            step += 1

    def test(self) -> Iterator[Batch]:
        """See Dataset."""
        for indices in self._order.test(self._test_samples):
            yield self._take(self._testing, indices)

    def close(self) -> None:
        """See Dataset."""

    def _take(self, pool: Batch, indices: Indices) -> Batch:
        place = torch.from_numpy(indices % len(pool.labels)).to(self._device)  # (n,) int64
        return Batch(pool.inputs[place], pool.labels[place])

    def _draw(self, part: int, samples: int, dtype: torch.dtype) -> Batch:
        labels = torch.arange(samples) % self.classes
        inputs = torch.empty(samples, *self.shape, dtype=dtype)
        for number, label in enumerate(labels.tolist()):
            inputs[number] = self._normal(MEANS, label) + self._normal(part, number)
        return Batch(inputs.to(self._device), labels.to(self._device))

    def _normal(self, *seed: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(self.shape, dtype=np.float32))
