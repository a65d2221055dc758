"""Labelled images by index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.data.sampler import Indices


class Images(Protocol):
    """Labelled images by index; goes to other processes by pickle."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read an image, PIL's or a tensor (C, H, W), and its label.

        Raises CorruptImage, or DataError for another reason that it cannot be read; both name it.
        """

    def name(self, index: int) -> str:
        """Say which image it is."""

    def labels(self) -> Indices:
        """Labels of all images (N,)."""


@dataclass(frozen=True)
class Parts:
    """What a dataset consists of."""

    training: Images
    testing: Images
    classes: int
    digest: str
    class_names: Sequence[str] = ()
    """In the order of their labels; empty if they have none."""
