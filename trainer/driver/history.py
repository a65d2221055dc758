"""History of a job: the worker group runs of every attempt.

It is stored next to the checkpoints.
"""

import time
from pathlib import Path

import fsspec
from pydantic import AliasChoices, Field, ValidationError

from trainer.jobspec import AttemptTask, FileModel, Outcome

HISTORY_FILE = "run.json"


def checkpoint_folder(task: AttemptTask, job_id: str | None = None) -> str:
    """Return the path or address of the checkpoints of a job.

    The default is the task's job; other jobs have the same `checkpoint.address`.
    """
    address, folder = task.spec.checkpoint.address, Path(task.context.folder)
    if job_id is not None:
        folder = folder.parent / job_id
    return (
        f"{address.rstrip('/')}/{job_id or task.context.job_id}" if address else str(folder / "checkpoints")
    )


class WorkerGroupRun(FileModel):
    """Worker group run: the first of an attempt, or a restart within it."""

    attempt: int
    began_seconds: float
    """Start time in seconds since 1970, like the end time."""
    ended_seconds: float | None = None
    outcome: Outcome | None = None
    """Outcome; None while running, and if the driver was killed."""


class RunContent(FileModel):
    """Content of the history file."""

    job_id: str
    worker_group_runs: tuple[WorkerGroupRun, ...] = Field(
        default=(), validation_alias=AliasChoices("worker_group_runs", "tries")
    )
    """Runs in order of their start; files of earlier versions call them `tries`."""


class RunHistory:
    """Writer of `run.json`, which it replaces at each start and end of a run."""

    def __init__(self, folder: str, task: AttemptTask) -> None:
        self._files, root = fsspec.core.url_to_fs(folder)
        self._files.makedirs(root, exist_ok=True)
        self._path = f"{root}/{HISTORY_FILE}"
        self._content = self._read() or RunContent(job_id=task.context.job_id)
        self._attempt = task.context.attempt
        self._begin()

    def restart(self, outcome: Outcome) -> None:
        """Record the end of the current run, and the start of another one."""
        self.end(outcome)
        self._begin()

    def end(self, outcome: Outcome) -> None:
        """Record the end of the current run."""
        *before, last = self._content.worker_group_runs
        ended = last.model_copy(update={"ended_seconds": time.time(), "outcome": outcome})
        self._write((*before, ended))

    def _begin(self) -> None:
        self._write(
            (
                *self._content.worker_group_runs,
                WorkerGroupRun(attempt=self._attempt, began_seconds=time.time()),
            )
        )

    def _read(self) -> RunContent | None:
        try:
            return RunContent.model_validate_json(self._files.cat_file(self._path))
        except (FileNotFoundError, ValidationError):
            return None

    def _write(self, runs: tuple[WorkerGroupRun, ...]) -> None:
        self._content = self._content.model_copy(update={"worker_group_runs": runs})
        # Written under another name first, so that readers see the old file or the new one.
        self._files.pipe_file(f"{self._path}.new", self._content.model_dump_json(indent=1).encode())
        self._files.mv(f"{self._path}.new", self._path)
