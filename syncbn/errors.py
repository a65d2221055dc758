"""Errors of this package.

SyncBatchNormError
├── InputError        (also ValueError)    the input tensors cannot be normalised
├── GroupError        (also ValueError)    this rank cannot synchronise over the process group
├── ConversionError   (also TypeError)     a module cannot be converted without changing its behaviour
├── ExportError       (also RuntimeError)  a program with collectives cannot be exported
└── DesyncError       (also RuntimeError)  the ranks are not in the same call of the same layer
"""

from __future__ import annotations


class SyncBatchNormError(Exception):
    """Base class of the errors of this package."""


class InputError(SyncBatchNormError, ValueError):
    """Unsupported shape, dtype or device of a tensor, or too few values on all ranks."""


class GroupError(SyncBatchNormError, ValueError):
    """Process group over which this rank cannot synchronise."""


class ConversionError(SyncBatchNormError, TypeError):
    """Conversion that would change the behaviour of a module."""


class ExportError(SyncBatchNormError, RuntimeError):
    """Export of a training program, whose collectives an exported program cannot have."""


class DesyncError(SyncBatchNormError, RuntimeError):
    """Collective that was mispaired or that ranks did not join within the timeout.

    The ranks are out of step and statistics may be mixed. Do not continue with this process group.
    """

    def __init__(
        self, message: str, layer: str, phase: str, call_number: int, missing_ranks: tuple[int, ...]
    ) -> None:
        super().__init__(message)
        self.layer = layer
        """Name of the layer on this rank."""
        self.phase = phase
        """"forward", "forward in float64" or "backward"."""
        self.call_number = call_number
        """Sequence number of the collective on this rank: calls of this layer and phase so far, including
        this one.
        """
        self.missing_ranks = missing_ranks
        """Global ranks that were not seen in the same call."""

    def __reduce__(self) -> tuple[type[DesyncError], tuple[str, str, str, int, tuple[int, ...]]]:
        return DesyncError, (str(self), self.layer, self.phase, self.call_number, self.missing_ranks)
