"""Dataset interface of the training loop: batches by step."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples on the worker's device: inputs (n, *shape) floating, labels (n,) int64; n may be 0."""

    inputs: Tensor
    labels: Tensor


class Dataset(Protocol):
    """Labelled samples to train and to test on, as one of the workers sees them.

    What a step's global batch holds, augmentation included, is a function of seed and step alone, so it neither depends on the
    number of workers (but under `by_label`, whose shards are the workers') nor on where a run was resumed.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample, channels first."""

    @property
    def classes(self) -> int:
        """Labels are 0 to this, exclusive."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in the order of their labels; empty if they have none."""

    @property
    def skipped_images(self) -> frozenset[str]:
        """Names of the corrupt images that were left out by choice, as far as this worker has come since it was opened."""

    @property
    def digest(self) -> str:
        """Fingerprint of the samples, equal wherever they lie and however they are transformed."""

    def train(self, first_step: int) -> Generator[list[Batch]]:
        """Yield without end: item k is this worker's share of step `first_step` + k, one batch for each of `accumulate` parts."""

    def test(self) -> Iterator[Batch]:
        """Yield this worker's share of each test batch.

        Every worker gets the same number of batches, so that each can take part in collectives; shares may be empty. Over all
        workers each test sample comes once, but for corrupt images that are left out by choice.
        """

    def close(self) -> None:
        """End what was started for loading."""
