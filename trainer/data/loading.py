"""Images that are read one by one, by torch's DataLoader in processes of its own."""

import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.data.dataset import Batch
from trainer.data.order import Indices, Order
from trainer.data.transforms import PixelTransform, is_random, normalize
from trainer.errors import DataError, InvalidInput
from trainer.spec import ImageTransformSpec, JobSpec

PREFETCH = 2
"""Parts of steps that each process loads ahead."""
MOST_PROCESSES = 8
"""For one worker: they should feed any GPU, and each holds some 300 MB."""
LEAST_TIMEOUT_SECONDS = 120
"""Processes import torchvision before they load their first image."""


class Images(Protocol):
    """Labelled images by index; goes to other processes by pickle."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Read an image, PIL's or a tensor (C, H, W), and its label. Raises DataError, which names it, if that cannot be done."""

    def name(self, index: int) -> str:
        """Say which image it is."""

    def labels(self) -> Indices:
        """Labels of all images (N,)."""


@dataclass(frozen=True)
class Parts:
    """What a dataset consists of."""

    training: Images
    testing: Images
    classes: int
    digest: str
    skipped_images: int = 0


class Request(NamedTuple):
    """Images to load together; a step only in training."""

    step: int | None
    indices: Indices


class LoadedDataset:
    """Images read and transformed by loader processes, and scaled on the worker's device."""

    def __init__(
        self,
        spec: JobSpec,
        transform: ImageTransformSpec,
        parts: Parts,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        processes: int | None = None,
    ) -> None:
        """`processes` that load, 0 for this one alone; None for what the cores allow."""
        self.classes, self.digest, self.skipped_images = parts.classes, parts.digest, parts.skipped_images
        self._accumulate, self._transform, self._device, self._dtype = spec.accumulate, transform, device, dtype
        self._processes = count_processes(world_size) if processes is None else processes
        self._timeout_seconds = max(LEAST_TIMEOUT_SECONDS, spec.collective_timeout_seconds)
        labels = parts.training.labels() if spec.sharding == "by_label" else None
        self._order = Order(spec, rank, world_size, len(parts.training), labels)
        self._reader = Reader(parts, transform, spec.seed)
        self.shape = self._reader.shape
        # Evaluations follow each other, so that they share processes.
        requests = [Request(None, indices) for indices in self._order.test(len(parts.testing))]
        self._test_loader = self._load(requests, keep_processes=True)
        self._streams: WeakSet[Generator[Any, None, None]] = WeakSet()

    def train(self, first_step: int) -> Generator[list[Batch]]:
        """See Dataset."""
        return self._keep(self._train(first_step))

    def test(self) -> Iterator[Batch]:
        """See Dataset."""
        return self._keep(self._receive(loaded) for loaded in self._test_loader)

    def close(self) -> None:
        """See Dataset."""
        for stream in list(self._streams):
            stream.close()
        del self._test_loader

    def _keep(self, stream: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Remember a stream, whose end is that of its processes."""
        self._streams.add(stream)
        return stream

    def _train(self, first_step: int) -> Generator[list[Batch], None, None]:
        requests = (
            Request(step, indices) for step in itertools.count(first_step) for indices in self._order.train(step)
        )
        loaded = iter(self._load(requests))
        while True:
            yield [self._receive(next(loaded)) for _ in range(self._accumulate)]

    def _load(self, requests: Iterable[Request], *, keep_processes: bool = False) -> DataLoader[Any]:
        options: dict[str, Any] = {}
        if self._processes:
            # A fork would take over locks that threads of Ray and torch hold.
            options = {
                "multiprocessing_context": "spawn",
                "persistent_workers": keep_processes,
                "prefetch_factor": PREFETCH,
                "timeout": self._timeout_seconds,
            }
        return DataLoader(
            self._reader,
            batch_size=None,  # a request is a batch
            sampler=requests,
            num_workers=self._processes,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the process's random numbers, which are dropout's
            **options,
        )

    def _receive(self, loaded: tuple[Tensor, Tensor] | InvalidInput) -> Batch:
        if isinstance(loaded, InvalidInput):
            raise loaded
        images, labels = (tensor.to(self._device, non_blocking=True) for tensor in loaded)
        return Batch(normalize(self._transform, images, self._dtype), labels)


class Reader(torch.utils.data.Dataset[Any]):
    """Reads requests, in whatever process."""

    def __init__(self, parts: Parts, transform: ImageTransformSpec, seed: int) -> None:
        self._parts, self._seed, self._random = parts, seed, is_random(transform)
        self._train_transform = PixelTransform(transform, training=True)
        self._test_transform = PixelTransform(transform, training=False)
        self.shape = tuple(self._test_transform(parts.testing[0][0]).shape)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor] | InvalidInput:
        """Return images (n, *shape) uint8 and labels (n,) int64; or an error, which DataLoader would raise as another."""
        images = torch.empty(len(request.indices), *self.shape, dtype=torch.uint8)
        labels = torch.empty(len(request.indices), dtype=torch.int64)
        try:
            for place, index in enumerate(request.indices.tolist()):
                images[place], labels[place] = self._read(request.step, index)
        except InvalidInput as error:
            return error
        return images, labels

    def _read(self, step: int | None, index: int) -> tuple[Tensor, int]:
        part = self._parts.testing if step is None else self._parts.training
        image, label = part[index]
        if step is None:
            pixels = self._test_transform(image)
        elif self._random:
            pixels = self._train_transform.at_random(image, self._seed, step, index)
        else:
            pixels = self._train_transform(image)
        if pixels.shape != self.shape:
            takes = f"takes a crop where images differ in size: {part.name(index)} makes {tuple(pixels.shape)}, others {self.shape}"
            raise DataError("data.transform.crop", None, takes)
        if not 0 <= label < self._parts.classes:
            takes = f"takes labels from 0 to {self._parts.classes - 1}: {part.name(index)} has another"
            raise DataError("data", label, takes)
        return pixels, label


def count_processes(world_size: int) -> int:
    """Loader processes for one worker: its part of the cores that this machine's workers may use, and one at least."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # Ray Train and torchrun tell
    return min(MOST_PROCESSES, max(1, len(os.sched_getaffinity(0)) // workers))


def _as_it_is(loaded: Any) -> Any:
    return loaded
