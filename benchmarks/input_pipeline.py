"""Throughput of `imagefolder` compared with torchvision's ImageFolder in torch's DataLoader, batch by
batch.

Both decode the same JPEG files, apply random crops, and scale by mean and std, without training. The
receiving process has one thread.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from trainer.data.dataloader import ImageDataset
from trainer.data.folders import open_folders
from trainer.jobspec import ImageFolderSpec, ImageTransformSpec, JobSpec

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WARM_UP_BATCHES = 3


def write_images(root: Path, count: int, side: int) -> None:
    """Write smooth images, which compress like photographs."""
    random = np.random.default_rng(0)
    for part, images in (("train", count), ("val", 4)):
        for name in ("a", "b"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(images // 2):
                small = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                small.resize((side, side), Image.Resampling.BICUBIC).save(
                    folder / f"{number}.jpg", quality=90
                )


def ours(root: Path, crop: int, batch: int, processes: int) -> Iterator[Any]:
    transform = ImageTransformSpec(crop=crop, random_resized_crop=False, mean=MEAN, std=STD)
    data = ImageFolderSpec(root=str(root), transform=transform)
    spec = JobSpec.model_validate(
        {"data": data, "norm": "none", "global_batch_size": batch, "steps": 1, "num_workers": 1}
    )
    dataset = ImageDataset(
        spec, data, open_folders(data), 0, 1, torch.device("cpu"), torch.float32, processes
    )
    return dataset.train(0)


def collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate like torch, with labels in shared memory like the images.

    Otherwise a thread copies the labels while they are sent, without the GIL, and a process that ends
    meanwhile aborts.
    """
    images, labels = default_collate(samples)
    return images, labels.share_memory_() if get_worker_info() else labels


def theirs(root: Path, crop: int, batch: int, processes: int) -> Iterator[Any]:
    scale = [
        v2.ToImage(),
        v2.RandomCrop(crop),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    loader = DataLoader(
        ImageFolder(str(root / "train"), v2.Compose(scale)),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=processes,
        collate_fn=collate,
        persistent_workers=processes > 0,
        multiprocessing_context="spawn" if processes else None,
    )
    return chain.from_iterable(repeat(loader))


def measure(streams: list[Iterator[Any]], batches: int, images: int) -> list[list[float]]:
    """Return images per second of processor time of each stream, batch by batch in turn, after a warm-up.

    There is one process; its processor time equals the wall time on an idle machine.
    """
    rates: list[list[float]] = [[] for _ in streams]
    for stream in streams:
        for _ in range(WARM_UP_BATCHES):
            next(stream)
    for turn in range(batches):
        order = [0, 1] if turn % 2 else [1, 0]
        for place in order:
            start = time.process_time()
            next(streams[place])
            rates[place].append(images / (time.process_time() - start))
    return rates


def measure_in_turn(make: list[Any], rounds: int, batches: int, images: int) -> list[list[float]]:
    """Return images per second of wall time of pipelines with loader processes, one at a time."""
    rates: list[list[float]] = [[] for _ in make]
    for turn in range(rounds):
        for place in [0, 1] if turn % 2 else [1, 0]:
            stream = make[place]()
            for _ in range(2 * WARM_UP_BATCHES):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches):
                next(stream)
            rates[place].append(batches * images / (time.perf_counter() - start))
            if hasattr(stream, "close"):
                stream.close()
            del stream
    return rates


def report(title: str, rates: list[list[float]]) -> None:
    ratios = [own / other for own, other in zip(*rates, strict=True)]
    for name, values in (("ours", rates[0]), ("torchvision", rates[1]), ("ratio", ratios)):
        quarters = statistics.quantiles(values, n=4)
        print(
            f"{title}: {name} median {statistics.median(values):.4g}, quartiles {quarters[0]:.4g} to "
            f"{quarters[2]:.4g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--crop", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20, help="of each, without loader processes")
    parser.add_argument("--rounds", type=int, default=7, help="of each, with loader processes")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}; {vars(arguments)}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, arguments.images, arguments.side)
        place = root, arguments.crop, arguments.batch
        streams = [ours(*place, 0), theirs(*place, 0)]
        report("no loader processes", measure(streams, arguments.batches, arguments.batch))
        if arguments.processes:
            make = [lambda: ours(*place, arguments.processes), lambda: theirs(*place, arguments.processes)]
            rates = measure_in_turn(make, arguments.rounds, arguments.batches, arguments.batch)
            report(f"{arguments.processes} loader processes", rates)


if __name__ == "__main__":
    main()
