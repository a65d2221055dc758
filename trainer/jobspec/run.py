"""Context, outcome and files of an attempt."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from trainer.jobspec.base import FrozenModel
from trainer.jobspec.job import JobSpec
from trainer.jobspec.permissions import Allowlist


class AttemptContext(FrozenModel):
    """Context of one attempt, sent by the service together with the spec."""

    job_id: str
    attempt: int = Field(ge=1)
    name: str
    folder: str = Field(description="absolute path of the job's files, on storage that all nodes share")
    mlflow_url: str | None = None
    mlflow_token: str | None = Field(None, repr=False, description="what this attempt writes to its MLflow run with")
    mlflow_run_id: str | None = None
    permissions: Allowlist = Allowlist()
    secrets: dict[str, str] = Field(
        {}, description="environment variables of the workers, to the files with their values"
    )
    resumed_from: tuple[str, ...] = Field(
        (),
        description="ended jobs, whose folders lie beside this one's, in whose checkpoints to look for one to go on from",
    )


class Progress(FrozenModel):
    """How far an attempt is; rank 0 keeps it in `progress.json`."""

    step: int
    total_steps: int
    samples_per_second: float
    eta_seconds: float


Cause = Literal[
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
"""Why an attempt ended before its time, as classified where it happened."""


class Outcome(FrozenModel):
    """The true end of an attempt as the trainer saw it, in `outcome.json`. To diverge is a result: such a run has succeeded."""

    state: Literal["succeeded", "failed"]
    reason: str
    cause: Cause | None = None
    rank: int | None = None
    """Of the worker that failed first."""
    step: int | None = None
    """Optimiser steps that the worker had done."""
    traceback: str | None = None
    """Of the first failure, not of those it drew after it."""
    metrics: dict[str, float] = Field({})


JOB_VARIABLE = "SYNCBN_JOB"
"""Environment variable with the path of the attempt's task file, for the driver."""
TASK_FILE = "task.json"
"""In the attempt's folder: its `Task`. A file, since one environment variable holds 128 KiB at most."""


class Task(FrozenModel):
    """One attempt of a job: the spec and its context."""

    spec: JobSpec
    context: AttemptContext


def attempt_folder(job_folder: Path, attempt: int) -> Path:
    """Folder of one attempt's own files, under the job's folder."""
    return job_folder / f"attempt-{attempt}"


def worker_log_file(rank: int) -> str:
    """File name of what the worker of this rank prints, in the attempt's folder."""
    return f"log-rank-{rank:05d}.txt"


LOG_FILE, PROGRESS_FILE, OUTCOME_FILE = "log.txt", "progress.json", "outcome.json"
"""The log is the driver's; workers have files of their own, see `worker_log_file`."""
FEEDER_LOG_FILE = "log-feeder.txt"
LOG_INDEX_FILE = "log.index"
"""Order of the attempt's log files: lines of a file's name and the byte up to which it comes before the next line's file."""
OUTBOX_FILE = "metrics.jsonl"
"""In the job's folder: what MLflow is to hold, a JSON object in each line; those with `step` and `metrics` are measurements."""
DRIVER_FILE = "driver"
"""An attempt's one driver made it: another one ends at once."""
CLOSED_FILE = "closed"
"""The service made it: the attempt is over for it, and no driver starts any more."""
SAVING_FILE = "saving"
"""There as long as rank 0 writes a checkpoint, whose name it holds."""
