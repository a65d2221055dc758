"""Files of a run that the service reads and writes."""

import asyncio
import errno
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from service.domain.errors import StorageFull, UpstreamUnavailable
from service.domain.jobs import Job
from trainer.jobspec import (
    CLOSED_FILE,
    DRIVER_FILE,
    LOG_FILE,
    OUTBOX_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    TASK_FILE,
    Outcome,
    Progress,
    Task,
    attempt_folder,
)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
P = ParamSpec("P")
STORAGE_SECONDS = 20.0
"""For a look at a job's files."""
STORAGE_THREADS = ThreadPoolExecutor(32, thread_name_prefix="storage")
"""Its own, so that storage keeps nothing but looks at it waiting, and is kept waiting by nothing else."""
MOST_BYTES = 1_000_000
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space on the disk, in the quota, or by the process's own limit."""
PROBE = b"\0" * 4_096
SECONDS_BETWEEN_PROBES = 2.0
PROBE_SECONDS = 5.0
MARK_FILE = ".storage"
"""By which the storage is known again."""


@dataclass(frozen=True)
class Point:
    """Metrics measured after a step."""

    step: int
    metrics: dict[str, float]


POINT = TypeAdapter(Point)


async def on_storage(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function on files in a thread. Raises UpstreamUnavailable after a timeout."""
    return await on_threads(STORAGE_THREADS, partial(copy_context().run, work, *arguments, **options))


async def on_threads(threads: Executor, work: Callable[[], T]) -> T:
    """Call a function on files in one of `threads`. Raises UpstreamUnavailable after a timeout."""
    try:
        async with asyncio.timeout(STORAGE_SECONDS):
            return await asyncio.get_running_loop().run_in_executor(threads, work)
    except (TimeoutError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageFull(f"the storage has no space left: {error.strerror}") from error
        raise UpstreamUnavailable(f"the storage did not answer: {error or type(error).__name__}") from error


class RunFiles:
    """Files of all runs under a folder that the cluster shares."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage.resolve()
        self._is_known = False
        self._probed_at = -math.inf
        self._full: StorageFull | None = None

    def check(self) -> None:
        """Check the storage by writing and reading a file.

        Raises OSError, also if what was there once is not: a mount that is gone leaves an empty folder.
        """
        mark = self._storage / MARK_FILE
        if not self._is_known:
            self._storage.mkdir(parents=True, exist_ok=True)
            mark.touch()
            self._is_known = True
        os.utime(mark)
        with tempfile.TemporaryFile(dir=self._storage) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != PROBE:
                raise OSError(errno.EIO, "the storage does not return what was written")

    async def ensure_space(self) -> None:
        """Raise StorageFull if the storage was full some seconds ago."""
        if time.monotonic() - self._probed_at > SECONDS_BETWEEN_PROBES:
            self._probed_at = time.monotonic()
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await on_storage(self.check)
                self._full = None
            except StorageFull as error:
                self._full = error
            except (UpstreamUnavailable, TimeoutError):
                self._full = None
        if self._full is not None:
            raise StorageFull(str(self._full))

    def job_folder(self, job_id: str) -> Path:
        """Folder of all attempts of a job."""
        return self._storage / job_id

    def attempt_folder(self, job: Job, attempt: int | None = None) -> Path:
        """Folder of one attempt, by default the newest."""
        return attempt_folder(self.job_folder(job.id), attempt or job.attempt)

    def close_attempts(self, job: Job, last: int | None = None) -> None:
        """Close the attempts up to `last` (default: current): their drivers do not start and end."""
        for attempt in range(1, (job.attempt if last is None else last) + 1):
            folder = self.attempt_folder(job, attempt)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CLOSED_FILE).touch()

    def write_task(self, task: Task) -> Path:
        """Write the task file of an attempt, readable only by its user, and return its path."""
        path = attempt_folder(self.job_folder(task.context.job_id), task.context.attempt) / TASK_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{TASK_FILE}.")
        with os.fdopen(handle, "w") as file:
            file.write(task.model_dump_json())
        return Path(name).replace(path)

    def task(self, job: Job) -> Task | None:
        """Return the task of the current attempt, or None."""
        return self._read(job, TASK_FILE, Task)

    def progress(self, job: Job) -> Progress | None:
        """Return the progress of the current attempt, or None."""
        return self._read(job, PROGRESS_FILE, Progress)

    def sign_of_life(self, job: Job) -> float | None:
        """Return the time of the last heartbeat of the current attempt, by the driver's clock."""
        try:
            return (self.attempt_folder(job) / DRIVER_FILE).stat().st_mtime
        except FileNotFoundError:
            return None

    def outcome(self, job: Job) -> Outcome | None:
        """Return the outcome of the current attempt, or None."""
        return self._read(job, OUTCOME_FILE, Outcome)

    def metrics(self, job: Job, place: int) -> tuple[list[Point], int]:
        """Read measurements from an offset of the outbox; also return the next offset."""
        try:
            with (self.job_folder(job.id) / OUTBOX_FILE).open("rb") as file:
                file.seek(place)
                lines = file.readlines(MOST_BYTES)
        except FileNotFoundError:
            return [], place
        if lines and not lines[-1].endswith(b"\n"):  # still being written
            lines.pop()
        return list(_points(lines)), place + sum(map(len, lines))

    def log_path(self, job: Job, attempt: int) -> Path:
        """Return the folder of an attempt's log, if it exists."""
        return self.attempt_folder(job, attempt) / LOG_FILE

    def _read(self, job: Job, name: str, kind: type[M]) -> M | None:
        path = self.attempt_folder(job) / name
        try:
            return kind.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None


def _points(lines: Iterable[bytes]) -> Iterator[Point]:
    """Parse the measurements among lines; incomplete and other lines are skipped."""
    for text in lines:
        with suppress(ValidationError):
            yield POINT.validate_json(text)
