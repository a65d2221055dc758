"""Samples of a step and a worker."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigurationError
from trainer.jobspec import JobSpec

Indices = NDArray[np.int64]


def batch_indices(samples: int, batch_size: int, step: int, *seed: int) -> Indices:
    """Indices (batch_size,) of step `step`'s batch: a function of these arguments alone, whatever the number of workers.

    The order is one endless row of permutations, a new one for each pass over the data; a batch may span two of them.
    """
    first = step * batch_size
    passes = range(first // samples, (first + batch_size - 1) // samples + 1)
    order = np.concatenate([_permutation(samples, *seed, number) for number in passes])
    start = first - passes[0] * samples
    return order[start : start + batch_size]


@lru_cache(maxsize=4)
def _permutation(samples: int, *seed: int) -> Indices:
    return np.random.default_rng(seed).permutation(samples)


def shard(indices: Indices, rank: int, world_size: int) -> Indices:
    """Worker `rank`'s part of `indices`: contiguous parts whose sizes differ by one at most, that together are the whole."""
    return np.array_split(indices, world_size)[rank]


class Order:
    """A worker's share of every step, and of the test samples.

    A global batch is first cut into its `accumulate` parts, and each of them is shared out over the workers. Under `by_label` the
    samples, sorted by label, are cut into one shard for each worker, which draws its shares from its own shard.
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
        """`labels` (samples,) are those of the training samples; `by_label` takes them. Without `shuffle`, iid goes by index.

        Raises ConfigurationError if the data cannot fill one batch.
        """
        if spec.global_batch_size > samples:
            raise ConfigurationError(
                "global_batch_size", spec.global_batch_size, f"must be at most {samples}, all samples of the data"
            )
        self._spec, self._rank, self._world_size = spec, rank, world_size
        self._samples, self._shuffle = samples, shuffle
        self.shard: Indices | None = None
        """Under `by_label`, the indices of this worker's samples, ordered by label."""
        if spec.sharding == "by_label":
            assert labels is not None
            self.shard = shard(np.argsort(labels, kind="stable"), rank, world_size)
            sizes = [len(self._share(part)) for part in self._parts(np.arange(spec.global_batch_size))]
            self._size, self._cuts = sum(sizes), np.cumsum(sizes)[:-1]

    def train(self, step: int) -> list[Indices]:
        """Return the indices of this worker's samples in each part of step `step`."""
        seed = self._spec.seed
        if self.shard is not None:
            mine = batch_indices(len(self.shard), self._size, step, seed, self._rank)
            return np.split(self.shard[mine], self._cuts)
        size = self._spec.global_batch_size
        if self._shuffle:
            batch = batch_indices(self._samples, size, step, seed)
        else:
            batch = np.arange(step * size, (step + 1) * size) % self._samples
        return [self._share(part) for part in self._parts(batch)]

    def test(self, samples: int) -> Iterator[Indices]:
        """Yield the indices of this worker's samples in each batch of the `samples` test samples."""
        size = self._spec.evaluation.batch_size
        for start in range(0, samples, size):
            yield self._share(np.arange(start, min(start + size, samples)))

    def _parts(self, batch: Indices) -> list[Indices]:
        return np.array_split(batch, self._spec.accumulate)

    def _share(self, part: Indices) -> Indices:
        return shard(part, self._rank, self._world_size)
