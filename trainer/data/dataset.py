"""Dataset interface of the training loop, and labelled images by index."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from trainer.data.sampler import Indices


@dataclass(frozen=True)
class Batch:
    """Samples on the worker's device.

    Inputs (n, *shape), floating point; labels (n,), int64; n may be 0.
    """

    inputs: Tensor
    labels: Tensor


class Dataset(Protocol):
    """Labelled training and test samples, as one worker sees them.

    The global batch of a step, including augmentation, is a function of seed and step. It depends neither on
    the number of workers (except under `by_label`, where each worker has a shard) nor on where a run was
    resumed.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample, channels first."""

    @property
    def classes(self) -> int:
        """Number of classes; labels are 0 to `classes - 1`."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes in label order; empty if they have none."""

    @property
    def skipped_images(self) -> frozenset[str]:
        """Names of the corrupt images that were skipped since opening, for this worker."""

    @property
    def digest(self) -> str:
        """Fingerprint of the samples, independent of their location and transforms."""

    def train(self, first_step: int) -> Generator[list[Batch]]:
        """Yield this worker's shares of steps `first_step`, `first_step` + 1, ...

        The generator does not end. Each item has one batch per part of `gradient_accumulation_steps`.
        """

    def test(self) -> Iterator[Batch]:
        """Yield this worker's share of each test batch.

        Every worker gets the same number of batches, so that all take part in collectives; shares may be
        empty. Over all workers, each test sample comes exactly once, except for skipped corrupt images.
        """

    def close(self) -> None:
        """End loader processes and streams."""


class Images(Protocol):
    """Labelled images by index, picklable for other processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read an image, a PIL image or a tensor (C, H, W), and its label.

        Raises CorruptImage, or DataError if it cannot be read for another reason; both have its name.
        """

    def name(self, index: int) -> str:
        """Return the name of an image."""

    def labels(self) -> Indices:
        """Return the labels of all images, shape (N,)."""


@dataclass(frozen=True)
class Splits:
    """Training and test part of a dataset."""

    training: Images
    testing: Images
    classes: int
    digest: str
    class_names: Sequence[str] = ()
    """Names of the classes in label order; empty if they have none."""
