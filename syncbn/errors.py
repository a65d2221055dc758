"""What can go wrong in this package.

SyncBatchNormError
├── InputError        (a ValueError too)  the tensors given cannot be normalised
├── GroupError        (a ValueError too)  this rank cannot synchronise over the process group given
└── ConversionError   (a TypeError too)   a module cannot be converted without changing what it computes
"""


class SyncBatchNormError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(SyncBatchNormError, ValueError):
    """A tensor has a shape, dtype or device that the layer does not take, or all ranks together hold too few values."""


class GroupError(SyncBatchNormError, ValueError):
    """The process group is not one that this rank can synchronise over."""


class ConversionError(SyncBatchNormError, TypeError):
    """A module's behaviour would be lost if it became a synchronised layer."""
