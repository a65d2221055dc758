"""Specs, and folders of images for tests."""

import numpy as np
import torch
from PIL import Image

from trainer.data import open_dataset
from trainer.spec import JobSpec

CPU = torch.device("cpu")


def make_spec(data, **changes):
    values = {
        "data": data,
        "norm": "none",
        "global_batch_size": 6,
        "steps": 10,
        "evaluation": {"batch_size": 4},
        "num_workers": 1,
    }
    return JobSpec.model_validate(values | changes)


def open_all(spec, world_size, **options):
    """The dataset as each of the workers sees it."""
    return [open_dataset(spec, rank, world_size, CPU, torch.float32, **options) for rank in range(world_size)]


def take(datasets, first_step, steps):
    """The global batches of some steps, part by part, put together from what the workers see: [(inputs, labels), ...]."""
    parts = []
    streams = [dataset.train(first_step) for dataset in datasets]
    for _ in range(steps):
        shares = [next(stream) for stream in streams]
        parts += [join(part) for part in zip(*shares, strict=True)]
    for stream in streams:
        stream.close()
    return parts


def take_test(datasets):
    """All test batches, put together from what the workers see; there are as many on each of them."""
    return [join(shares) for shares in zip(*(dataset.test() for dataset in datasets), strict=True)]


def join(shares):
    return torch.cat([share.inputs for share in shares]), torch.cat([share.labels for share in shares])


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def write_images(root, *, train=5, test=3, classes=("cat", "dog"), size=(12, 10), suffix="png", seed=0):
    """Write a folder of images per class below `train` and `val`; each image differs."""
    random = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", test)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return root


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
