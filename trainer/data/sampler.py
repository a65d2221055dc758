"""Indices of the samples of a step and a worker."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigurationError
from trainer.jobspec import JobSpec

Indices = NDArray[np.int64]


def batch_indices(samples: int, batch_size: int, step: int, *seed: int) -> Indices:
    """Return the indices (batch_size,) of the batch of step `step`.

    They are a function of the arguments, independent of the number of workers. The order is an endless
    sequence of permutations, one per pass over the data; a batch may span two of them.
    """
    first = step * batch_size  # position in the endless sequence
    passes = range(first // samples, (first + batch_size - 1) // samples + 1)
    order = np.concatenate([_permutation(samples, *seed, number) for number in passes])
    start = first - passes[0] * samples
    return order[start : start + batch_size]


# A batch needs at most two permutations, and evaluations do not use them.
@lru_cache(maxsize=4)
def _permutation(samples: int, *seed: int) -> Indices:
    return np.random.default_rng(seed).permutation(samples)


def shard(indices: Indices, rank: int, world_size: int) -> Indices:
    """Return part `rank` of `world_size` contiguous parts of `indices`.

    The sizes of the parts differ by at most one.
    """
    return np.array_split(indices, world_size)[rank]


class DistributedBatchSampler:
    """Shares of one worker of every step and of the test samples.

    A global batch is first divided into `gradient_accumulation_steps` parts, and each part over the workers.
    Under `by_label` the samples, sorted by label, are divided into one shard per worker, from which the
    worker draws its shares.
    """

    def __init__(
        self,
        spec: JobSpec,
        rank: int,
        world_size: int,
        samples: int,
        labels: Indices | None = None,
        *,
        shuffle: bool = True,
    ) -> None:
        """Set the order.

        `labels` (samples,) are the training labels, required for `by_label`. Without `shuffle`, iid samples
        come in index order. Raises ConfigurationError if the data is smaller than one batch.
        """
        if spec.global_batch_size > samples:
            raise ConfigurationError(
                "global_batch_size",
                spec.global_batch_size,
                f"must be at most {samples}, all samples of the data",
            )
        self._spec, self._rank, self._world_size = spec, rank, world_size
        self._samples, self._shuffle = samples, shuffle
        self.shard: Indices | None = None
        """Indices of this worker's samples under `by_label`, sorted by label."""
        if spec.data_partition == "by_label":
            assert labels is not None
            # Stable, so that the shard does not depend on the sorting algorithm.
            self.shard = shard(np.argsort(labels, kind="stable"), rank, world_size)
            # The same sizes as under `iid`, so that only the choice of samples differs.
            sizes = [len(self._share(part)) for part in self._parts(np.arange(spec.global_batch_size))]
            self._size, self._cuts = sum(sizes), np.cumsum(sizes)[:-1]

    def train(self, step: int) -> list[Indices]:
        """Return the indices of this worker's samples in each part of step `step`."""
        seed = self._spec.seed
        if self.shard is not None:
            # The rank is part of the seed: workers permute their shards independently.
            mine = batch_indices(len(self.shard), self._size, step, seed, self._rank)
            return np.split(self.shard[mine], self._cuts)
        size = self._spec.global_batch_size
        if self._shuffle:
            batch = batch_indices(self._samples, size, step, seed)
        else:
            batch = np.arange(step * size, (step + 1) * size) % self._samples
        return [self._share(part) for part in self._parts(batch)]

    def test(self, samples: int) -> Iterator[Indices]:
        """Yield the indices of this worker's share of each test batch."""
        size = self._spec.evaluation.batch_size
        for start in range(0, samples, size):
            yield self._share(np.arange(start, min(start + size, samples)))

    def _parts(self, batch: Indices) -> list[Indices]:
        return np.array_split(batch, self._spec.gradient_accumulation_steps)

    def _share(self, part: Indices) -> Indices:
        return shard(part, self._rank, self._world_size)
