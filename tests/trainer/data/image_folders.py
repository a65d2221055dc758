"""Image folders for tests."""

import torch

from tests.trainer.data.image_files import CPU
from trainer.data.dataloader import ImageDataset
from trainer.data.folders import open_folders
from trainer.jobspec import ImageFolderSpec


def open_here(spec, world_size=1, processes=0):
    return [
        ImageDataset(
            spec, spec.data, open_folders(spec.data), rank, world_size, CPU, torch.float32, processes
        )
        for rank in range(world_size)
    ]


def folder(root, **changes):
    return ImageFolderSpec(root=str(root), **changes)
