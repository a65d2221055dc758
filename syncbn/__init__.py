"""Batch normalisation whose statistics are those of all ranks' data, as if it stood on one device."""

from syncbn.convert import BatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.errors import ConversionError, DesyncError, GroupError, InputError, SyncBatchNormError
from syncbn.functional import sync_batch_norm
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments

__all__ = [
    "BatchNorm",
    "ConversionError",
    "DesyncError",
    "GroupError",
    "InputError",
    "Moments",
    "SyncBatchNorm",
    "SyncBatchNormError",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]
