"""What can go wrong in this package.

SyncBatchNormError
├── InputError        (a ValueError too)    the tensors given cannot be normalised
├── GroupError        (a ValueError too)    this rank cannot synchronise over the process group given
├── ConversionError   (a TypeError too)     a module cannot be converted without changing what it computes
└── DesyncError       (a RuntimeError too)  the ranks are not in the same call of the same layer
"""

from __future__ import annotations


class SyncBatchNormError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(SyncBatchNormError, ValueError):
    """A tensor has a shape, dtype or device that the layer does not take, or all ranks together hold too few values."""


class GroupError(SyncBatchNormError, ValueError):
    """The process group is not one that this rank can synchronise over."""


class ConversionError(SyncBatchNormError, TypeError):
    """A module's behaviour would be lost if it became a synchronised layer."""


class DesyncError(SyncBatchNormError, RuntimeError):
    """A layer's collective met another call than its own, or ranks stayed away from it past the time limit.

    Ranks have lost count of each other by then, and statistics may be mixed: do not go on with this process group.
    """

    def __init__(self, message: str, layer: str, phase: str, call_number: int, missing_ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.layer = layer
        """Name of the layer this rank was in."""
        self.phase = phase
        """"forward" or "backward"."""
        self.call_number = call_number
        """How many collectives of this layer and phase there were on this rank, this one included."""
        self.missing_ranks = missing_ranks
        """Global ranks that were not seen in the same call."""

    def __reduce__(self) -> tuple[type[DesyncError], tuple[str, str, str, int, tuple[int, ...]]]:
        return DesyncError, (str(self), self.layer, self.phase, self.call_number, self.missing_ranks)
