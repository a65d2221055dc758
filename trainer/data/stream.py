"""Streamed data by Ray Data, for datasets larger than a machine.

One actor, the feeder, reads the data for all workers. Each row is read and decoded once, by tasks of Ray Data
anywhere in the cluster. The feeder orders the rows, forms batches, and returns to each worker its share on
request.
"""

import json
import logging
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import torch
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.exceptions import GetTimeoutError, RayTaskError

from trainer.data.cache import digest
from trainer.data.class_folders import ClassFolders, list_some
from trainer.data.corrupt import CORRUPT, Preprocessed, SkippedImages, refuse_many, replace_corrupt
from trainer.data.dataset import Batch
from trainer.data.files import Files, is_broken, list_files
from trainer.data.preprocess import Preprocessor
from trainer.data.sampler import Indices, shard
from trainer.data.shuffle import BatchCursor, RowOrder, Rows
from trainer.data.transforms import normalize
from trainer.errors import ConfigurationError, CorruptImage, DataError, DataTimeoutError, RunError
from trainer.jobspec import FEEDER_LOG_FILE, JobSpec, RayDataSpec
from trainer.logs import redirect_output

PREFETCH = 2
"""Number of batches that a worker requests ahead."""
READ_ROWS = 64
"""Number of rows that are decoded and sent to the feeder together."""
MIN_TIMEOUT_SECONDS = 300
"""Minimum timeout: rows are counted, and a first window is decoded, before the first batch."""
LIMITS_INTERVAL_SECONDS = 0.05
"""Interval at which Ray Data reads the resources of the cluster; by default 1 s."""
CURSORS = 2
"""Number of concurrent streams of training batches: one for training, one for evaluations with precise
statistics.
"""


class Description(NamedTuple):
    """Description of the data by the feeder."""

    train_samples: int
    test_samples: int
    digest: str
    class_names: list[str]
    """Names of the classes; empty unless folders are classes."""


def start_feeder(spec: JobSpec, logs: Path | None = None) -> Any:
    """Start the feeder of a run in the connected Ray; return it for `open_dataset`.

    It ends with `stop_feeder` or with the Ray job. If its process dies, Ray restarts it: it has no state that
    cannot be recomputed. Its output goes to a file in the folder `logs`. Raises ConfigurationError or
    DataError as `open_dataset` does.
    """
    feeder = (
        ray.remote(_Feeder)
        # No CPU is reserved, since the workers of the job may use all of them.
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote(spec.model_dump_json(), logs and logs / FEEDER_LOG_FILE)
    )
    try:
        _get(feeder.describe.remote(), spec)
    except BaseException:
        stop_feeder(feeder)
        raise
    return feeder


def stop_feeder(feeder: Any) -> None:
    """Stop a feeder and its tasks."""
    ray.kill(feeder)


class StreamedDataset:
    """Dataset of the feeder's batches, for one worker."""

    def __init__(
        self,
        spec: JobSpec,
        data: RayDataSpec,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        feeder: Any,
    ) -> None:
        self._spec, self._transform, self._feeder = spec, data.transform, feeder
        self._place, self._device, self._dtype = (rank, world_size), device, dtype
        description = _get(feeder.describe.remote(), spec)
        self.shape, self.classes, self.digest = tuple(data.shape), data.classes, description.digest
        self.class_names = description.class_names
        self._test_batches = -(-description.test_samples // spec.evaluation.batch_size)

    @property
    def skipped_images(self) -> frozenset[str]:
        """See Dataset.

        These are the images that the feeder has met for all workers. It reads ahead, and forgets them if its
        process dies.
        """
        names: frozenset[str] = _get(self._feeder.skipped_images.remote(), self._spec)
        return names

    def train(self, first_step: int) -> Generator[list[Batch]]:
        """See Dataset."""
        steps = (self._feeder.train.remote(first_step, step, *self._place) for step in count(first_step))
        for parts in self._receive(steps):
            yield [self._to_batch(part) for part in parts]

    def test(self) -> Iterator[Batch]:
        """See Dataset."""
        batches = (self._feeder.test.remote(number, *self._place) for number in range(self._test_batches))
        for inputs, labels in self._receive(batches):
            readable = labels != CORRUPT
            yield self._to_batch((inputs[readable], labels[readable]))

    def close(self) -> None:
        """See Dataset.

        The feeder continues, for other workers.
        """

    def _receive(self, requests: Iterator[Any]) -> Iterator[Any]:
        """Yield the answers to requests, which are sent a few ahead."""
        waiting = deque(islice(requests, PREFETCH))
        while waiting:
            waiting.extend(islice(requests, 1))
            yield _get(waiting.popleft(), self._spec)

    def _to_batch(self, share: Rows) -> Batch:
        inputs, labels = (torch.tensor(array).to(self._device) for array in share)
        return Batch(normalize(self._transform, inputs, self._dtype), labels)


class _Feeder:
    """Actor that feeds all workers.

    Calls are independent, so that they can be repeated and come from any number of workers.
    """

    def __init__(self, spec: str, log: Path | None = None) -> None:
        if log is not None:
            redirect_output(log)
        self._spec = JobSpec.model_validate_json(spec)
        self._cursors: OrderedDict[int, BatchCursor] = OrderedDict()
        self._skipped = SkippedImages()
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # Each pass over the data begins with limits of 0, and a busy loop until Ray Data reads them again.
        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = LIMITS_INTERVAL_SECONDS
        context = ray.data.DataContext.get_current()
        # The order of rows must not depend on which task ends first.
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.use_datasource_v2 = False  # it would list files in another order
        context.raise_original_map_exception = True  # the wrapping error does not contain the original

    def describe(self) -> Description:
        """Find the data and describe it. Raises ConfigurationError and DataError."""
        (train, _), (test, _) = self._parts
        names = train.class_names if self._data.format == "images" else []
        return Description(
            train.samples, test.samples, digest(self._data.format, train.digest, test.digest), names
        )

    def train(self, first_step: int, step: int, rank: int, world_size: int) -> list[Rows]:
        """Return a worker's share of each part of a step.

        `first_step` distinguishes concurrent streams.
        """
        cursor = self._cursors.pop(first_step, None) or BatchCursor(
            self._parts[0][1].rows_from, self._spec.global_batch_size
        )
        # Moved to the end, so that the least recently used cursor is dropped.
        self._cursors[first_step] = cursor
        if len(self._cursors) > CURSORS:
            self._cursors.popitem(last=False)
        batch = cursor.batch(step)
        parts = np.array_split(np.arange(len(batch[1])), self._spec.gradient_accumulation_steps)
        return [_share(batch, shard(part, rank, world_size)) for part in parts]

    def test(self, number: int, rank: int, world_size: int) -> Rows:
        """Return a worker's share of a test batch; skipped corrupt images have CORRUPT."""
        batch = self._test_cursor.batch(number)
        return _share(batch, shard(np.arange(len(batch[1])), rank, world_size))

    def skipped_images(self) -> frozenset[str]:
        """Return the names of the corrupt images skipped so far."""
        return self._skipped.names

    @property
    def _data(self) -> RayDataSpec:
        assert isinstance(self._spec.data, RayDataSpec)
        return self._spec.data

    @cached_property
    def _test_cursor(self) -> BatchCursor:
        return BatchCursor(self._parts[1][1].rows_from, self._spec.evaluation.batch_size)

    @cached_property
    def _parts(self) -> tuple[tuple[Files, RowOrder], tuple[Files, RowOrder]]:
        """Files of the training and test data, each with their order."""
        data = self._data
        train, test = list_files("data.train", data.train, data), list_files("data.test", data.test, data)
        if self._spec.global_batch_size > train.samples:
            raise ConfigurationError(
                "global_batch_size",
                self._spec.global_batch_size,
                f"must be at most {train.samples}, all samples of the data",
            )
        if not test.samples:
            raise DataError("data.test", data.test, "must have at least one sample")
        classes = _check_classes(data, train, test) if data.format == "images" else []

        def read(files: Files, training: bool, number: int, indices: Indices) -> Iterator[Rows]:
            seed = [self._spec.seed, number] if training else None
            mine = [files.paths[index] for index in indices]
            folders = ClassFolders(files.folder, classes) if data.format == "images" else None
            prepare = Preprocessor(data, folders, seed)

            field, address = ("data.train", data.train) if training else ("data.test", data.test)

            def prepared(paths: list[str]) -> Iterator[Preprocessed]:
                with _reading(field, address):
                    yield from _read(data, files, paths, prepare, self._tasks, self._skipped)

            if not training:
                return ((batch.inputs, batch.labels) for batch in refuse_many(prepared(mine)))
            # File by file, since the first one most likely has a readable row.
            from_start = chain.from_iterable(prepared([path]) for path in files.paths)
            return replace_corrupt(prepared(mine), from_start)

        # With one image per file, permuting the files suffices.
        window = data.shuffle_rows if data.format != "images" else 0
        return (
            (train, RowOrder(train.rows, partial(read, train, True), self._spec.seed, window)),
            (test, RowOrder(test.rows, partial(read, test, False), None)),
        )

    @cached_property
    def _tasks(self) -> int:
        """Number of concurrent tasks.

        They reserve no CPUs in Ray: two jobs could otherwise each wait for CPUs that the other holds.
        """
        cpus = int(ray.cluster_resources().get("CPU", 0))
        workers = 0 if self._spec.use_gpu else self._spec.max_workers
        return max(1, cpus - workers)


@contextmanager
def _reading(field: str, address: str) -> Iterator[None]:
    """Convert read errors of damaged files to DataError with the address.

    The errors come from this process or from tasks of Ray Data; other errors pass.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if not is_broken(cause):
            raise
        # The first line only, since Ray Data appends advice; args, since str() quotes the text of a KeyError.
        first_line = str(*cause.args[:1]).partition("\n")[0]
        raise DataError(
            field, address, f"must be readable files: {type(cause).__name__}: {first_line}"
        ) from error


def _read(
    data: RayDataSpec,
    files: Files,
    paths: list[str],
    preparation: Preprocessor,
    tasks: int,
    skipped: SkippedImages,
) -> Iterator[Preprocessed]:
    """Read and preprocess the rows of files in the order of `paths`.

    Raises the errors of rows, except for corrupt images that are to be skipped.
    """
    options: dict[str, Any] = {"include_paths": True, "num_cpus": 0, "concurrency": tasks}
    if not isinstance(files.filesystem, LocalFileSystem):
        options["filesystem"] = PyFileSystem(FSSpecHandler(files.filesystem))
    match data.format:
        case "parquet":
            columns = [data.input_column, data.label_column]
            rows = ray.data.read_parquet(paths, columns=columns, **options)
        case "images":
            rows = ray.data.read_binary_files(paths, **options)
        case "webdataset":
            rows = ray.data.read_webdataset(paths, decoder=None, **options)
    rows = rows.map_batches(
        preparation,
        batch_size=READ_ROWS,
        batch_format="numpy",
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=tasks),
    )
    # Number of rows of the batches before, to name the row of an error.
    done = 0
    for batch in rows.iter_batches(batch_size=READ_ROWS, batch_format="numpy"):
        corrupt = [""] * len(batch["label"])
        for place in np.flatnonzero(batch["error"] != ""):
            field, value, rule = json.loads(batch["error"][place])
            is_corrupt = batch["label"][place] == CORRUPT
            if not is_corrupt or data.corrupt_images == "refuse":
                if data.format == "parquet":
                    row = files.row_in_file(paths, done + int(place))
                    rule += f"; it is row {row} of the file, counted from 0"
                raise (CorruptImage if is_corrupt else DataError)(field, value, rule)
            corrupt[place] = value
        done += len(corrupt)
        skipped.add(filter(None, corrupt))
        # Copies, since views would keep whole blocks in Ray's shared memory.
        yield Preprocessed(np.array(batch["input"]), np.array(batch["label"]), corrupt)


def _check_classes(data: RayDataSpec, train: Files, test: Files) -> list[str]:
    classes = train.class_names
    if len(classes) != data.classes:
        raise DataError(
            "data.classes",
            data.classes,
            f"must be {len(classes)}, the number of image folders: {list_some(classes)}",
        )
    unknown = sorted(set(test.class_names) - set(classes))
    if unknown:
        raise DataError(
            "data.test",
            data.test,
            f"must have the classes of {data.train}; not among them: {list_some(unknown)}",
        )
    return classes


def _share(batch: Rows, indices: Indices) -> Rows:
    inputs, labels = batch
    return inputs[indices], labels[indices]


def _get(reference: Any, spec: JobSpec) -> Any:
    """Wait for the feeder's answer, with a timeout; raise RunErrors as they were."""
    seconds = max(MIN_TIMEOUT_SECONDS, spec.collective_timeout_seconds)
    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError as error:
        raise DataTimeoutError(f"Ray Data had no batch within {seconds} seconds") from error
    except RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from None
        raise
