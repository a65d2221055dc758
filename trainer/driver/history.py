"""History of a job: worker group runs of every attempt.

It is stored with the checkpoints.
"""

import time
from pathlib import Path

import fsspec
from pydantic import ValidationError

from trainer.jobspec import FrozenModel, Outcome, Task

MANIFEST_FILE = "run.json"


def checkpoint_folder(task: Task, job_id: str | None = None) -> str:
    """Path or address of the checkpoints of the task's job, or of another job with the same `checkpoint.address`."""
    address, folder = task.spec.checkpoint.address, Path(task.context.folder)
    if job_id is not None:
        folder = folder.parent / job_id
    return f"{address.rstrip('/')}/{job_id or task.context.job_id}" if address else str(folder / "checkpoints")


class Try(FrozenModel):
    """One start of the workers: an attempt of the job, or a restart within it."""

    attempt: int
    began_seconds: float
    """In seconds since 1970, like the end."""
    ended_seconds: float | None = None
    outcome: Outcome | None = None
    """None while it runs, or if the driver was killed."""


class RunContent(FrozenModel):
    """The file's content."""

    job_id: str
    tries: tuple[Try, ...] = ()


class RunHistory:
    """Maintains `run.json`, replaced as a whole at each start and end."""

    def __init__(self, folder: str, task: Task) -> None:
        self._files, root = fsspec.core.url_to_fs(folder)
        self._files.makedirs(root, exist_ok=True)
        self._path = f"{root}/{MANIFEST_FILE}"
        self._content = self._read() or RunContent(job_id=task.context.job_id)
        self._attempt = task.context.attempt
        self._begin()

    def restart(self, outcome: Outcome) -> None:
        """Note how the workers ended, and that they are started again."""
        self.end(outcome)
        self._begin()

    def end(self, outcome: Outcome) -> None:
        """Note how the newest try ended."""
        *before, last = self._content.tries
        ended = last.model_copy(update={"ended_seconds": time.time(), "outcome": outcome})
        self._write((*before, ended))

    def _begin(self) -> None:
        self._write((*self._content.tries, Try(attempt=self._attempt, began_seconds=time.time())))

    def _read(self) -> RunContent | None:
        try:
            return RunContent.model_validate_json(self._files.cat_file(self._path))
        except (FileNotFoundError, ValidationError):
            return None

    def _write(self, tries: tuple[Try, ...]) -> None:
        self._content = self._content.model_copy(update={"tries": tries})
        # Under another name first: what is read is the old file or the new one.
        self._files.pipe_file(f"{self._path}.new", self._content.model_dump_json(indent=1).encode())
        self._files.mv(f"{self._path}.new", self._path)
