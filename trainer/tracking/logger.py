"""Metrics logger of rank 0: console, progress file and outbox."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol

from trainer.checkpoint.checkpoints import Manifest
from trainer.jobspec import AttemptTask, attempt_folder
from trainer.tracking.outbox import Kind, Outbox
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.uploader import TrackingProcess


class MetricsLogger(Protocol):
    """Interface of the training loop to its logger."""

    def resume(self, checkpoint: Manifest | None, refused: Sequence[str]) -> None:
        """Log the loaded checkpoint and the skipped ones."""

    def log(self, step: int, metrics: Mapping[str, float], kind: Kind = "evaluation") -> None:
        """Log metrics measured after `step` steps."""

    def update(self, step: int) -> None:
        """Log the number of completed steps."""


class NullLogger:
    """Logger of all ranks except the first, which does nothing."""

    def resume(self, checkpoint: Manifest | None, refused: Sequence[str]) -> None:
        """Do nothing."""

    def log(self, step: int, metrics: Mapping[str, float], kind: Kind = "evaluation") -> None:
        """Do nothing."""

    def update(self, step: int) -> None:
        """Do nothing."""


class RankZeroLogger:
    """Logger that prints metrics, appends them to the outbox and writes the progress."""

    def __init__(self, total_steps: int, outbox: Outbox, progress: ProgressFile) -> None:
        self._total_steps, self._progress = total_steps, progress
        self.outbox = outbox

    def resume(self, checkpoint: Manifest | None, refused: Sequence[str]) -> None:
        """Log the loaded checkpoint and the skipped ones."""
        for reason in refused:
            print(f"checkpoint skipped: {reason}", flush=True)
        if checkpoint is not None:
            print(f"resuming from {checkpoint.name}, saved by {checkpoint.world_size} workers", flush=True)

    def log(self, step: int, metrics: Mapping[str, float], kind: Kind = "evaluation") -> None:
        """Log metrics measured after `step` steps."""
        if kind == "evaluation":
            values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"step {step}/{self._total_steps}  {values}", flush=True)
        self.outbox.log(step, metrics, kind)

    def update(self, step: int) -> None:
        """Log the number of completed steps."""
        self._progress.update(step)


@contextmanager
def open_logger(task: AttemptTask, rank: int) -> Iterator[MetricsLogger]:
    """Open this rank's logger.

    Leaving the context waits for uploads to MLflow, at most three minutes.
    """
    if rank != 0:
        yield NullLogger()
        return
    context, spec = task.context, task.spec
    folder = Path(context.folder)
    progress = ProgressFile(attempt_folder(folder, context.attempt), spec.steps, spec.global_batch_size)
    outbox = Outbox(folder)
    with (
        closing(outbox),
        TrackingProcess(folder, context.mlflow_url, context.mlflow_run_id, context.mlflow_token),
    ):
        yield RankZeroLogger(spec.steps, outbox, progress)
