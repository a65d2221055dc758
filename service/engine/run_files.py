"""What the service reads of a run's files: progress, outcome and log."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from service.domain.jobs import Job
from trainer.spec import (
    CLOSED_FILE,
    DRIVER_FILE,
    LOG_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    Outcome,
    Progress,
    attempt_folder,
)

T = TypeVar("T", bound=BaseModel)


class RunFiles:
    """The files of all runs, under one folder that the cluster shares."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage.resolve()

    def job_folder(self, job_id: str) -> Path:
        """Folder of all attempts of a job."""
        return self._storage / job_id

    def attempt_folder(self, job: Job, attempt: int | None = None) -> Path:
        """Folder of one attempt, by default the newest."""
        return attempt_folder(self.job_folder(job.id), attempt or job.attempt)

    def close_attempt(self, job: Job) -> None:
        """Let no driver of the current attempt start from now on."""
        folder = self.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CLOSED_FILE).touch()

    def progress(self, job: Job) -> Progress | None:
        """Read how far the current attempt is; None if it has not said yet."""
        return self._read(job, PROGRESS_FILE, Progress)

    def sign_of_life(self, job: Job) -> float | None:
        """When the driver of the current attempt last showed that it lives, by its own clock; None before its first sign."""
        try:
            return (self.attempt_folder(job) / DRIVER_FILE).stat().st_mtime
        except FileNotFoundError:
            return None

    def outcome(self, job: Job) -> Outcome | None:
        """Read how the current attempt ended; None if it has not written that."""
        return self._read(job, OUTCOME_FILE, Outcome)

    def log_path(self, job: Job, attempt: int) -> Path:
        """Where an attempt's log is, once there is one."""
        return self.attempt_folder(job, attempt) / LOG_FILE

    def _read(self, job: Job, name: str, kind: type[T]) -> T | None:
        path = self.attempt_folder(job) / name
        try:
            return kind.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
