"""Context, outcome and files of an attempt."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator

from trainer.jobspec.base import FileModel
from trainer.jobspec.job import JobSpec
from trainer.jobspec.permissions import Allowlist


class AttemptContext(FileModel):
    """Context of one attempt, sent by the service with the specification."""

    job_id: str
    attempt: int = Field(ge=1)
    name: str
    folder: str = Field(description="absolute path of the job's folder, on storage shared by all nodes")
    mlflow_url: str | None = None
    mlflow_token: str | None = Field(
        None, repr=False, description="credential of this attempt for its MLflow run"
    )
    mlflow_run_id: str | None = None
    permissions: Allowlist = Allowlist()
    secrets: dict[str, str] = Field(
        {}, description="environment variables of the workers, mapped to files with their values"
    )
    resumed_from: tuple[str, ...] = Field(
        (),
        description="ended jobs, in sibling folders, whose checkpoints this job may resume from",
    )


class Progress(FileModel):
    """Progress of an attempt, written by rank 0 to `progress.json`."""

    step: int
    total_steps: int
    samples_per_second: float
    eta_seconds: float


FailureKind = Literal[
    "user_code",
    "configuration",
    "data",
    "out_of_memory",
    "worker_lost",
    "preempted",
    "hang",
    "export",
    "diverged",
    "unknown",
]
"""Cause of a failure, classified where it happened."""


class Outcome(FileModel):
    """Outcome of an attempt as the trainer saw it, written to `outcome.json`.

    Divergence is a result: the state of such a run is `succeeded`.
    """

    state: Literal["succeeded", "failed"]
    reason: str
    cause: FailureKind | None = None
    rank: int | None = None
    """Rank of the worker that failed first."""
    step: int | None = None
    """Optimiser steps completed by that worker."""
    traceback: str | None = None
    """Traceback of the first failure, not of those that it caused."""
    metrics: dict[str, float] = Field({})

    @field_validator("cause", mode="before")
    @classmethod
    def _is_known(cls, cause: object) -> object:
        """Read a cause of a later version as unknown."""
        return "unknown" if isinstance(cause, str) and cause not in get_args(FailureKind) else cause


JOB_VARIABLE = "SYNCBN_JOB"
"""Environment variable with the path of the attempt's task file, for the driver."""
TASK_FILE = "task.json"
"""File with the `AttemptTask`, in the attempt's folder. An environment variable is limited to 128 KiB."""


class AttemptTask(FileModel):
    """Task of one attempt: specification and context.

    An unknown field of the specification is an error: without it, something else would be trained.
    """

    spec: JobSpec
    context: AttemptContext


def attempt_folder(job_folder: Path, attempt: int) -> Path:
    """Return the folder of an attempt, below the folder of the job."""
    return job_folder / f"attempt-{attempt}"


def worker_log_file(rank: int) -> str:
    """Return the file name of a worker's output, in the attempt's folder."""
    return f"log-rank-{rank:05d}.txt"


LOG_FILE, PROGRESS_FILE, OUTCOME_FILE = "log.txt", "progress.json", "outcome.json"
"""Output of the driver; `worker_log_file` returns the names of the workers' files."""
FEEDER_LOG_FILE = "log-feeder.txt"
LOG_INDEX_FILE = "log.index"
"""Order of the attempt's log files. Each line is a file name and the byte offset up to which the file
precedes the file of the next line.
"""
OUTBOX_FILE = "metrics.jsonl"
"""Outbox of MLflow writes in the job's folder, one JSON object per line; those with `step` and `metrics` are
measurements.
"""
NOT_STARTED = 3
"""Exit status of a driver that must not run: another one has the attempt, or it is closed."""
STORAGE_FAILED = 4
"""Exit status of a driver that could not write to the storage; it leaves no outcome."""
STORAGE_FAILURE = "the driver could not write to the storage"
DRIVER_FILE = "driver"
"""Lock file of the attempt's driver; a second driver ends at once."""
CLOSED_FILE = "closed"
"""Marker by the service that the attempt is over; no driver starts any more."""
STOP_FILE = "stop"
"""Marker by the service that the attempt should save a checkpoint and end."""
SAVING_FILE = "saving"
"""Name of the checkpoint that rank 0 is writing; exists only while it is written."""
