"""Datasets by name."""

from typing import Any

import torch

from trainer.data.dataset import Batch, Dataset
from trainer.data.sampler import batch_indices, shard
from trainer.jobspec import (
    DigitsSpec,
    ImageFolderSpec,
    JobSpec,
    Mnist5kSpec,
    RayDataSpec,
    SyntheticSpec,
    TorchvisionDataSpec,
)

__all__ = ["Batch", "Dataset", "batch_indices", "open_dataset", "shard"]


def open_dataset(
    spec: JobSpec, rank: int, world_size: int, device: torch.device, dtype: torch.dtype, feeder: Any = None
) -> Dataset:
    """Open the data of a specification for worker `rank` of `world_size`.

    Inputs have `dtype` and are on `device`. `feeder` is the result of `trainer.data.stream.start_feeder`, for
    Ray Data only.

    Raises ConfigurationError or DataError, with the field, if the data is missing, damaged or different from
    its specification.
    """
    # Each kind imports its libraries here, since some imports take seconds.
    data, place = spec.data, (rank, world_size, device, dtype)
    match data:
        case Mnist5kSpec() | DigitsSpec():
            from trainer.data.memory import InMemoryDataset

            return InMemoryDataset(spec, data, *place)
        case SyntheticSpec():
            from trainer.data.synthetic import SyntheticDataset

            return SyntheticDataset(spec, data, *place)
        case ImageFolderSpec():
            from trainer.data.dataloader import ImageDataset
            from trainer.data.folders import open_folders

            return ImageDataset(spec, data, open_folders(data), *place)
        case TorchvisionDataSpec():
            from trainer.data.dataloader import ImageDataset
            from trainer.data.torchvision import open_library

            return ImageDataset(spec, data, open_library(data), *place)
        case RayDataSpec():
            from trainer.data.stream import StreamedDataset

            return StreamedDataset(spec, data, *place, feeder)
