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

from service.adapters.shared_files import make_file, open_file, write_private_file
from service.domain.errors import StorageFull, UpstreamUnavailable
from service.domain.jobs import Job
from trainer.jobspec import (
    CLOSED_FILE,
    DRIVER_FILE,
    LOG_FILE,
    OUTBOX_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    STOP_FILE,
    TASK_FILE,
    AttemptTask,
    Outcome,
    Progress,
    attempt_folder,
)

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
P = ParamSpec("P")
STORAGE_SECONDS = 20.0
"""Timeout of one access to a job's files."""
STORAGE_THREADS = ThreadPoolExecutor(32, thread_name_prefix="storage")
"""Threads for access to the storage only, so that a storage that hangs does not block other work."""
MAX_READ_BYTES = 1_000_000
"""Maximum number of bytes of an outbox that are read at once."""
MAX_JSON_BYTES = 8_000_000
"""Maximum size of a task, progress or outcome file; larger files are ignored."""
MAX_REASON_CHARS = 10_000
"""Maximum length of an outcome's reason, since user code can write the file."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded disk quota, and the file size limit of the process."""
PROBE = b"\0" * 4_096
PROBE_INTERVAL_SECONDS = 2.0
PROBE_SECONDS = 5.0
MARK_FILE = ".storage"
"""File that identifies the storage."""


@dataclass(frozen=True)
class Point:
    """Metrics measured after a step."""

    step: int
    metrics: dict[str, float]


POINT = TypeAdapter(Point)


async def on_storage(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Call a function on files in a thread.

    Raises UpstreamUnavailable after a timeout.
    """
    return await on_threads(STORAGE_THREADS, partial(copy_context().run, work, *arguments, **options))


async def on_threads(threads: Executor, work: Callable[[], T]) -> T:
    """Call a function on files in one of `threads`.

    Raises UpstreamUnavailable after a timeout.
    """
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
        # Fails if the mark is gone, as with an unmounted storage; it must not be created again.
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
        if time.monotonic() - self._probed_at > PROBE_INTERVAL_SECONDS:
            # Set before the probe, so that concurrent requests do not probe too.
            self._probed_at = time.monotonic()
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await on_storage(self.check)
                self._full = None
            except StorageFull as error:
                self._full = error
            # Not full as far as is known; readiness reports a storage that does not answer.
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
        """Close the attempts up to `last` (default: current).

        Their drivers do not start, or end.
        """
        for attempt in range(1, (job.attempt if last is None else last) + 1):
            make_file(self._storage, self.attempt_folder(job, attempt) / CLOSED_FILE)

    def request_stop(self, job: Job) -> None:
        """Ask the driver of the current attempt to save a checkpoint and end."""
        make_file(self._storage, self.attempt_folder(job) / STOP_FILE)

    def write_task(self, task: AttemptTask) -> Path:
        """Write the task file of an attempt and return its path.

        Only its user can read the file.
        """
        path = attempt_folder(self.job_folder(task.context.job_id), task.context.attempt) / TASK_FILE
        write_private_file(self._storage, path, task.model_dump_json())
        return path

    def task(self, job: Job) -> AttemptTask | None:
        """Return the task of the current attempt, or None."""
        return self._read(job, TASK_FILE, AttemptTask)

    def progress(self, job: Job) -> Progress | None:
        """Return the progress of the current attempt, or None."""
        return self._read(job, PROGRESS_FILE, Progress)

    def last_heartbeat(self, job: Job) -> float | None:
        """Return the time of the last heartbeat of the current attempt.

        It is measured by the driver's clock.
        """
        try:
            return (self.attempt_folder(job) / DRIVER_FILE).stat().st_mtime
        except FileNotFoundError:
            return None

    def outcome(self, job: Job) -> Outcome | None:
        """Return the outcome of the current attempt, or None."""
        outcome = self._read(job, OUTCOME_FILE, Outcome)
        return outcome and outcome.model_copy(update={"reason": _storable(outcome.reason)})

    def metrics(self, job: Job, place: int) -> tuple[list[Point], int]:
        """Read measurements from an offset of the outbox; also return the next offset."""
        try:
            with open_file(self._storage, self.job_folder(job.id) / OUTBOX_FILE) as file:
                file.seek(place)
                content = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return [], place
        # The last line may still be being written; it is read next time.
        size = content.rfind(b"\n") + 1
        if not size and len(content) == MAX_READ_BYTES:  # longer than any line of ours
            size = MAX_READ_BYTES
        return list(_points(content[:size].split(b"\n"))), place + size

    def log_path(self, job: Job, attempt: int) -> Path:
        """Return the path of an attempt's log, which may not exist yet."""
        return self.attempt_folder(job, attempt) / LOG_FILE

    def _read(self, job: Job, name: str, kind: type[M]) -> M | None:
        path = self.attempt_folder(job) / name
        try:
            with open_file(self._storage, path) as file:
                return kind.model_validate_json(file.read(MAX_JSON_BYTES))
        except (FileNotFoundError, ValidationError):
            return None


def _storable(text: str) -> str:
    """Return text that a database can hold: PostgreSQL refuses NUL."""
    return text[:MAX_REASON_CHARS].replace("\0", "\ufffd")


def _points(lines: Iterable[bytes]) -> Iterator[Point]:
    """Parse the measurements among lines; incomplete and other lines are skipped."""
    for text in lines:
        with suppress(ValidationError):
            yield POINT.validate_json(text)
