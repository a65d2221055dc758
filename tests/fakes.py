"""Stand-ins for Ray and MLflow that keep everything in memory; the tests of the real ones run on them too."""

from dataclasses import dataclass, field
from pathlib import Path

from service.adapters.mlflow import RunAddress
from service.domain.comparisons import Comparison
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job, JobState
from service.domain.lifecycle import RayStatus, Submission
from service.domain.scheduling import Capacity, Cluster
from service.domain.statistics import Curve
from trainer.jobspec import Task


@dataclass
class FakeRay:
    """A cluster whose submissions go on when a test says so."""

    total: Capacity = field(default_factory=lambda: Capacity(cpus=2, gpus=0))
    free: Capacity | None = None
    """None: all of it; what this project's own jobs hold is counted by whoever asks."""
    submissions: dict[str, Submission] = field(default_factory=dict)
    tasks: dict[str, list[Task]] = field(default_factory=dict)
    largest_node_bytes: int | None = None
    is_down: bool = False
    refuses: bool = False

    async def submit(self, submission_id: str, task_file: Path) -> None:
        self._answer()
        if self.refuses:
            raise UpstreamRejected("Ray refused the submission with 500")
        if submission_id not in self.submissions:
            self.submissions[submission_id] = Submission(RayStatus.PENDING, "")
            task = Task.model_validate_json(task_file.read_text())  # noqa: ASYNC240 - a small local file
            self.tasks.setdefault(submission_id, []).append(task)

    async def find(self, submission_id: str) -> Submission | None:
        self._answer()
        return self.submissions.get(submission_id)

    async def stop(self, submission_id: str) -> None:
        self._answer()
        found = self.submissions.get(submission_id)
        # As the real one: stopping a submission that is still pending does nothing.
        if found is not None and found.status == RayStatus.RUNNING:
            self.set(submission_id, RayStatus.STOPPED)

    async def logs(self, submission_id: str) -> str:
        self._answer()
        return f"log of {submission_id}" if submission_id in self.submissions else ""

    async def cluster(self) -> Cluster:
        self._answer()
        placed = {name for name, found in self.submissions.items() if found.status == RayStatus.RUNNING}
        return Cluster(self.total, self.free or self.total, frozenset(placed), self.largest_node_bytes)

    def set(self, submission_id: str, status: RayStatus, message: str = "") -> None:
        """Let a submission go on."""
        self.submissions[submission_id] = Submission(status, message)

    def lose_everything(self) -> None:
        """Restart the head: nothing is known any more."""
        self.submissions.clear()

    def _answer(self) -> None:
        if self.is_down:
            raise UpstreamUnavailable("Ray did not answer")


@dataclass
class FakeMlflow:
    """A tracking server."""

    runs: dict[str, str] = field(default_factory=dict)
    """Run id to status."""
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    is_down: bool = False

    async def start_comparison(self, comparison: Comparison) -> RunAddress:
        return self._start(f"run-of-{comparison.id}")

    async def start_job(self, job: Job, comparison: Comparison | None) -> RunAddress:
        return self._start(f"run-of-{job.id}")

    async def finish(self, run_id: str, state: JobState) -> None:
        self._answer()
        self.runs[run_id] = state.value

    async def curve(self, run_id: str, metric: str) -> Curve:
        self._answer()
        return self.curves.get((run_id, metric), [])

    async def check(self) -> None:
        self._answer()

    def _start(self, run_id: str) -> RunAddress:
        self._answer()
        self.runs[run_id] = "running"
        return RunAddress(run_id, "1")

    def _answer(self) -> None:
        if self.is_down:
            raise UpstreamUnavailable("MLflow did not answer")
