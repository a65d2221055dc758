"""Image datasets read by torch's DataLoader in processes."""

import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.data.corrupt import Sample, SkippedImages, read
from trainer.data.dataset import Batch
from trainer.data.images import Parts
from trainer.data.sampler import Indices, Order
from trainer.data.transforms import PixelTransform, is_random, normalize
from trainer.errors import DataError, InvalidInput
from trainer.jobspec import ImageFolderSpec, JobSpec, TorchvisionDataSpec

PREFETCH = 2
"""Parts of steps that each process loads ahead."""
MOST_PROCESSES = 8
"""For one worker: they should feed any GPU, and each holds some 300 MB."""
LEAST_TIMEOUT_SECONDS = 120
"""Processes import torchvision before they load their first image."""


class Request(NamedTuple):
    """Images to load together; a step only in training."""

    step: int | None
    indices: Indices


class Loaded(NamedTuple):
    """What was read for a request: images (n, *shape) uint8, labels (n,) int64, and names of corrupt images that were left out."""

    images: Tensor
    labels: Tensor
    skipped: list[str]


class ImageDataset:
    """Images read and transformed by loader processes, and scaled on the worker's device."""

    def __init__(
        self,
        spec: JobSpec,
        data: ImageFolderSpec | TorchvisionDataSpec,
        parts: Parts,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        processes: int | None = None,
    ) -> None:
        """`processes` that load, 0 for this one alone; None for what the cores allow."""
        self.classes, self.digest, self.class_names = parts.classes, parts.digest, list(parts.class_names)
        self._accumulate, self._transform, self._device, self._dtype = spec.accumulate, data.transform, device, dtype
        self._skipped = SkippedImages()
        self._processes = count_processes(world_size) if processes is None else processes
        self._timeout_seconds = max(LEAST_TIMEOUT_SECONDS, spec.collective_timeout_seconds)
        labels = parts.training.labels() if spec.sharding == "by_label" else None
        self._order = Order(spec, rank, world_size, len(parts.training), labels)
        self._reader = Reader(parts, data, spec.seed, self._order.shard)
        self.shape = self._reader.shape
        # Evaluations follow each other, so that they share processes.
        requests = [Request(None, indices) for indices in self._order.test(len(parts.testing))]
        self._test_loader = self._load(requests, keep_processes=True)
        self._streams: WeakSet[Generator[Any, None, None]] = WeakSet()

    @property
    def skipped_images(self) -> frozenset[str]:
        """See Dataset."""
        return self._skipped.names

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

    def _receive(self, loaded: Loaded | InvalidInput) -> Batch:
        if isinstance(loaded, InvalidInput):
            raise loaded
        self._skipped.add(loaded.skipped)
        images, labels = (tensor.to(self._device, non_blocking=True) for tensor in (loaded.images, loaded.labels))
        return Batch(normalize(self._transform, images, self._dtype), labels)


class Reader(torch.utils.data.Dataset[Any]):
    """Reads requests, in whatever process."""

    def __init__(
        self, parts: Parts, data: ImageFolderSpec | TorchvisionDataSpec, seed: int, shard: Indices | None
    ) -> None:
        """`shard` holds the training images that are this worker's alone, None if all are everyone's."""
        self._parts, self._seed, self._random, self._shard = parts, seed, is_random(data.transform), shard
        self._skip = data.corrupt_images == "skip"
        self._train_transform = PixelTransform(data.transform, training=True)
        self._test_transform = PixelTransform(data.transform, training=False)
        self.shape = tuple(self._test_transform(read(parts.testing, 0, skip=self._skip).image).shape)

    def __getitem__(self, request: Request) -> Loaded | InvalidInput:
        """Read a request; or return an error, which DataLoader would raise as another."""
        try:
            return self._load(request)
        except InvalidInput as error:
            return error

    def _load(self, request: Request) -> Loaded:
        images = torch.empty(len(request.indices), *self.shape, dtype=torch.uint8)
        labels = torch.empty(len(request.indices), dtype=torch.int64)
        if torch.utils.data.get_worker_info() is not None:
            # Else a thread copies them as they are sent, without the GIL, and a process that ends meanwhile is aborted.
            for tensor in (images, labels):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        count, skipped = 0, list[str]()
        for index in request.indices.tolist():
            sample = self._read(request.step, index)
            skipped += sample.skipped
            if request.step is None and sample.skipped:
                continue  # in testing no other takes its place
            images[count], labels[count] = sample.image, sample.label
            count += 1
        return Loaded(images[:count], labels[:count], skipped)

    def _read(self, step: int | None, index: int) -> Sample:
        """Read an image, transformed; in training the worker's own, if it has a shard, takes the place of a corrupt one."""
        part, shard = (self._parts.testing, None) if step is None else (self._parts.training, self._shard)
        sample = read(part, index, skip=self._skip, among=shard)
        if step is None:
            pixels = self._test_transform(sample.image)
        elif self._random:
            # By the index that was asked for: one that takes another's place differs from itself in its own.
            pixels = self._train_transform.at_random(sample.image, self._seed, step, index)
        else:
            pixels = self._train_transform(sample.image)
        if pixels.shape != self.shape:
            name = part.name(sample.place)
            takes = f"must be set where images differ in size: {name} makes {tuple(pixels.shape)}, others {self.shape}"
            raise DataError("data.transform.crop", None, takes)
        if not 0 <= sample.label < self._parts.classes:
            takes = f"must have labels from 0 to {self._parts.classes - 1}: {part.name(sample.place)} has another"
            raise DataError("data", sample.label, takes)
        return sample._replace(image=pixels)


def count_processes(world_size: int) -> int:
    """Loader processes for one worker: its part of the cores that this machine's workers may use, and one at least."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # set by Ray Train and torchrun
    return min(MOST_PROCESSES, max(1, len(os.sched_getaffinity(0)) // workers))


def _as_it_is(loaded: Any) -> Any:
    return loaded
