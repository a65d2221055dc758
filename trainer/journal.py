"""What rank 0 tells the world while it trains: a line to read, the progress file, and metrics for MLflow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainer.progress import ProgressFile
from trainer.spec import Task, attempt_folder
from trainer.tracking import Journal, Outbox, Silent


class RankZeroJournal:
    """Prints metrics, appends them to the outbox and keeps the progress file."""

    def __init__(self, total_steps: int, outbox: Outbox, progress: ProgressFile) -> None:
        self._total_steps, self._outbox, self._progress = total_steps, outbox, progress

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics measured after `step` steps."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"step {step}/{self._total_steps}  {values}", flush=True)
        self._outbox.log(step, metrics)

    def update(self, step: int) -> None:
        """Tell that `step` steps are done."""
        self._progress.update(step)


@contextmanager
def open_journal(task: Task, rank: int) -> Iterator[Journal]:
    """Open this rank's journal; on leaving, metrics that are still on their way are sent (at most 60 seconds)."""
    if rank != 0:
        yield Silent()
        return
    context, spec = task.context, task.spec
    folder = Path(context.folder)
    progress = ProgressFile(attempt_folder(folder, context.attempt), spec.steps, spec.global_batch_size)
    with Outbox(folder, context.mlflow_url, context.mlflow_run_id) as outbox:
        yield RankZeroJournal(spec.steps, outbox, progress)
    if outbox.unsent:
        print(f"{outbox.unsent} steps' metrics did not reach MLflow; they stay in {folder}", flush=True)
