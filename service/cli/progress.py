"""Progress bars while waiting for jobs.

Ctrl-C ends the waiting, not the jobs.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from service.api.schemas import ComparisonView, EventView, JobSummaryView, JobView
from service.cli.output import errors, interruptible
from service.cli.tables import state_text
from service.client import Client
from trainer.jobspec import Progress as JobProgress


class JobBars:
    """Live progress bars of jobs; a context manager."""

    def __init__(self, console: Console = errors) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[speed]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, jobs: Sequence[JobSummaryView]) -> None:
        """Update the bars."""
        for job in jobs:
            if job.id not in self._tasks:
                self._tasks[job.id] = self._progress.add_task(
                    escape(job.name), total=job.steps, state="", speed=""
                )
            done = job.progress.step if job.progress else 0
            running = job.progress if job.state == "running" else None
            speed = (
                f"{running.samples_per_second:,.0f} samples/s, {running.eta_seconds:.0f} s left"
                if running
                else ""
            )
            self._progress.update(self._tasks[job.id], completed=done, state=state_text(job), speed=speed)


def wait_for_job(client: Client, job: JobView) -> JobView:
    """Wait for the end of a job and return the job."""
    hint = f"{job.id} continues; `syncbn logs -f {job.id}` follows it, `syncbn cancel {job.id}` ends it."
    with interruptible(hint), JobBars() as bars:
        bars.show([job])
        for event in client.follow_events(job.id):
            match event:
                case JobProgress():
                    job = job.model_copy(update={"progress": event})
                case EventView():
                    job = job.model_copy(update={"state": event.state, "reason": event.reason})
                case _:  # the end, of which the job knows more
                    job = client.job(job.id)
            bars.show([job])
        return job


def wait_for_comparison(client: Client, comparison: ComparisonView) -> ComparisonView:
    """Wait until all jobs of a comparison have ended and return it."""
    hint = (
        f"{comparison.id} continues; `syncbn report {comparison.id}` shows how far it is, "
        f"`syncbn cancel {comparison.id}` ends it."
    )
    with interruptible(hint), JobBars() as bars:
        return client.wait(comparison.id, float("inf"), lambda seen: bars.show(seen.jobs))
