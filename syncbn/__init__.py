"""Batch normalisation whose statistics are those of all ranks' data, as if it stood on one device."""

from syncbn.convert import convert_sync_batchnorm
from syncbn.errors import ConversionError, GroupError, InputError, SyncBatchNormError
from syncbn.functional import sync_batch_norm
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments

__all__ = [
    "ConversionError",
    "GroupError",
    "InputError",
    "Moments",
    "SyncBatchNorm",
    "SyncBatchNormError",
    "convert_sync_batchnorm",
    "sync_batch_norm",
]
