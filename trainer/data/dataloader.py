"""Image datasets read by torch's DataLoader in several processes."""

import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.data.corrupt import Sample, SkippedImages, read_or_replace
from trainer.data.dataset import Batch, Splits
from trainer.data.sampler import DistributedBatchSampler, Indices
from trainer.data.transforms import PixelTransform, is_random, normalize
from trainer.errors import DataError
from trainer.jobspec import ImageFolderSpec, JobSpec, TorchvisionDataSpec

PREFETCH = 2
"""Number of parts of steps that each process loads ahead."""
MAX_LOADER_PROCESSES = 8
"""Maximum number of loader processes per worker. They should be fast enough for any GPU, and each uses about
300 MB.
"""
MIN_TIMEOUT_SECONDS = 120
"""Minimum timeout: processes import torchvision before they load their first image."""


class BatchRequest(NamedTuple):
    """Request for images to load together; training requests have a step."""

    step: int | None
    indices: Indices


class Loaded(NamedTuple):
    """Loaded images (n, *shape) uint8, labels (n,) int64, names of skipped images."""

    images: Tensor
    labels: Tensor
    skipped: list[str]


class ImageDataset:
    """Image dataset, read by loader processes and scaled on the worker's device."""

    def __init__(
        self,
        spec: JobSpec,
        data: ImageFolderSpec | TorchvisionDataSpec,
        parts: Splits,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        processes: int | None = None,
    ) -> None:
        """Start with `processes` loaders: 0 for none, None for a default by cores."""
        self.classes, self.digest, self.class_names = parts.classes, parts.digest, list(parts.class_names)
        self._accumulate, self._transform, self._device, self._dtype = (
            spec.gradient_accumulation_steps,
            data.transform,
            device,
            dtype,
        )
        self._skipped = SkippedImages()
        self._processes = count_processes(world_size) if processes is None else processes
        # Slow loading should not fail before the collectives that wait for it would.
        self._timeout_seconds = max(MIN_TIMEOUT_SECONDS, spec.collective_timeout_seconds)
        labels = parts.training.labels() if spec.data_partition == "by_label" else None
        self._order = DistributedBatchSampler(spec, rank, world_size, len(parts.training), labels)
        self._reader = ImageReader(parts, data, spec.seed, self._order.shard)
        self.shape = self._reader.shape
        # Evaluations do not overlap, so they share processes.
        requests = [BatchRequest(None, indices) for indices in self._order.test(len(parts.testing))]
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
        """Keep a reference to a stream, with which its processes end."""
        self._streams.add(stream)
        return stream

    def _train(self, first_step: int) -> Generator[list[Batch], None, None]:
        requests = (
            BatchRequest(step, indices)
            for step in itertools.count(first_step)
            for indices in self._order.train(step)
        )
        loaded = iter(self._load(requests))
        while True:
            yield [self._receive(next(loaded)) for _ in range(self._accumulate)]

    def _load(self, requests: Iterable[BatchRequest], *, keep_processes: bool = False) -> DataLoader[Any]:
        options: dict[str, Any] = {}
        if self._processes:
            # fork would copy locks that threads of Ray and torch hold.
            options = {
                "multiprocessing_context": "spawn",
                "persistent_workers": keep_processes,
                "prefetch_factor": PREFETCH,
                "timeout": self._timeout_seconds,
            }
        return DataLoader(
            self._reader,
            batch_size=None,  # one request is one batch
            sampler=requests,
            num_workers=self._processes,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # the default generator is that of dropout
            **options,
        )

    def _receive(self, loaded: Loaded | DataError) -> Batch:
        if isinstance(loaded, DataError):
            raise loaded
        self._skipped.add(loaded.skipped)
        images, labels = (
            tensor.to(self._device, non_blocking=True) for tensor in (loaded.images, loaded.labels)
        )
        return Batch(normalize(self._transform, images, self._dtype), labels)


class ImageReader(torch.utils.data.Dataset[Any]):
    """Map-style dataset that reads requests, in any process."""

    def __init__(
        self, parts: Splits, data: ImageFolderSpec | TorchvisionDataSpec, seed: int, shard: Indices | None
    ) -> None:
        """Set up reading; `shard` has the indices of this worker's own images, if any."""
        self._parts, self._seed, self._random, self._shard = parts, seed, is_random(data.transform), shard
        self._skip = data.corrupt_images == "skip"
        self._train_transform = PixelTransform(data.transform, training=True)
        self._test_transform = PixelTransform(data.transform, training=False)
        self.shape = tuple(
            self._test_transform(read_or_replace(parts.testing, 0, skip=self._skip).image).shape
        )

    def __getitem__(self, request: BatchRequest) -> Loaded | DataError:
        """Read a request, or return its error, which DataLoader would convert."""
        try:
            return self._load(request)
        except DataError as error:
            return error

    def _load(self, request: BatchRequest) -> Loaded:
        images = torch.empty(len(request.indices), *self.shape, dtype=torch.uint8)
        labels = torch.empty(len(request.indices), dtype=torch.int64)
        if torch.utils.data.get_worker_info() is not None:
            # Otherwise a thread copies them on sending, without the GIL, and a process that exits meanwhile
            # is aborted.
            for tensor in (images, labels):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        count, skipped = 0, list[str]()
        for index in request.indices.tolist():
            sample = self._read(request.step, index)
            skipped += sample.skipped
            if request.step is None and sample.skipped:
                continue  # no replacement in testing
            images[count], labels[count] = sample.image, sample.label
            count += 1
        return Loaded(images[:count], labels[:count], skipped)

    def _read(self, step: int | None, index: int) -> Sample:
        """Read and transform an image.

        In training, an image of the worker's shard, if it has one, replaces a corrupt one.
        """
        part, shard = (self._parts.testing, None) if step is None else (self._parts.training, self._shard)
        sample = read_or_replace(part, index, skip=self._skip, candidates=shard)
        if step is None:
            pixels = self._test_transform(sample.image)
        elif self._random:
            # Seeded by the requested index, so that an image and its use as a replacement differ.
            pixels = self._train_transform.at_random(sample.image, self._seed, step, index)
        else:
            pixels = self._train_transform(sample.image)
        if pixels.shape != self.shape:
            name = part.name(sample.place)
            rule = (
                f"must be set if images differ in size: {name} has shape {tuple(pixels.shape)}, "
                f"others {self.shape}"
            )
            raise DataError("data.transform.crop", None, rule)
        if not 0 <= sample.label < self._parts.classes:
            rule = (
                f"must have labels from 0 to {self._parts.classes - 1}: {part.name(sample.place)} has another"
            )
            raise DataError("data", sample.label, rule)
        return sample._replace(image=pixels)


def count_processes(world_size: int) -> int:
    """Return the number of loader processes per worker.

    This is its share of the cores that this machine's workers may use, and at least one.
    """
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # set by Ray Train and torchrun
    return min(MAX_LOADER_PROCESSES, max(1, len(os.sched_getaffinity(0)) // workers))


def _as_it_is(loaded: Any) -> Any:
    return loaded
