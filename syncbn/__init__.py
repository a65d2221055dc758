"""Synchronised batch normalisation: statistics over the data of all ranks."""

from syncbn.convert import BatchNorm, convert_sync_batchnorm, register_conversion, revert_sync_batchnorm
from syncbn.errors import (
    ConversionError,
    DesyncError,
    ExportError,
    GroupError,
    InputError,
    SyncBatchNormError,
)
from syncbn.functional import sync_batch_norm
from syncbn.groups import new_sync_groups
from syncbn.module import SyncBatchNorm
from syncbn.moments import Moments
from syncbn.precise_bn import update_population_statistics
from syncbn.siblings import apply_together

__all__ = [
    "BatchNorm",
    "ConversionError",
    "DesyncError",
    "ExportError",
    "GroupError",
    "InputError",
    "Moments",
    "SyncBatchNorm",
    "SyncBatchNormError",
    "apply_together",
    "convert_sync_batchnorm",
    "new_sync_groups",
    "register_conversion",
    "revert_sync_batchnorm",
    "sync_batch_norm",
    "update_population_statistics",
]
