"""Progress file of a run, read by the service."""

import time
from pathlib import Path

from pydantic import ValidationError

from trainer.atomic import atomic_write
from trainer.jobspec import PROGRESS_FILE, Progress

WRITE_INTERVAL_SECONDS = 0.5


class ProgressFile:
    """Writer of `progress.json`: step, and speed and remaining time.

    The latter are measured since the last write.
    """

    def __init__(self, folder: Path, total_steps: int, batch_size: int) -> None:
        self._path = folder / PROGRESS_FILE
        self._total_steps, self._batch_size = total_steps, batch_size
        self._step, self._time = 0, time.monotonic()
        self._steps_per_second = 0.0

    def update(self, step: int) -> None:
        """Record completed steps; writes at most twice a second, and at the end."""
        now = time.monotonic()
        if now - self._time < WRITE_INTERVAL_SECONDS and step < self._total_steps:
            return
        if step > self._step:
            self._steps_per_second = (step - self._step) / (now - self._time)
        self._step, self._time = step, now
        left = (self._total_steps - step) / self._steps_per_second if self._steps_per_second else 0.0
        speed = self._steps_per_second * self._batch_size
        atomic_write(
            self._path,
            Progress(
                step=step,
                total_steps=self._total_steps,
                samples_per_second=round(speed, 1),
                eta_seconds=round(left, 1),
            ).model_dump_json(),
            durable=False,
        )


def read_step(folder: Path) -> int:
    """Return the step in `progress.json`; 0 if there is none."""
    try:
        return Progress.model_validate_json((folder / PROGRESS_FILE).read_bytes()).step
    except (OSError, ValidationError):
        return 0
