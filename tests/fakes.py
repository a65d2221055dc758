"""In-memory fakes of Ray and MLflow; the tests of the real adapters run on them too."""

from dataclasses import dataclass, field
from pathlib import Path

from service.adapters.mlflow import RunAddress
from service.adapters.mlflow_values import Publication
from service.domain.comparisons import Comparison
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job, JobState
from service.domain.lifecycle import RayStatus, Submission
from service.domain.resources import Cluster, Node, Resources
from service.domain.statistics import Curve
from trainer.jobspec import AttemptTask


@dataclass
class FakeRay:
    """Cluster whose submissions change state by `set`."""

    total: Resources = field(default_factory=lambda: Resources(cpus=2, gpus=0))
    free: Resources | None = None
    """None: the whole cluster; resources of this project's jobs are counted by the caller."""
    submissions: dict[str, Submission] = field(default_factory=dict)
    tasks: dict[str, list[AttemptTask]] = field(default_factory=dict)
    largest_node_bytes: int | None = None
    is_down: bool = False
    refuses: bool = False

    async def submit(self, submission_id: str, task_file: Path) -> None:
        self._answer()
        if self.refuses:
            raise UpstreamRejected("Ray refused the submission with 500")
        if submission_id not in self.submissions:
            self.submissions[submission_id] = Submission(RayStatus.PENDING, "")
            task = AttemptTask.model_validate_json(task_file.read_text())  # noqa: ASYNC240 - small file
            self.tasks.setdefault(submission_id, []).append(task)

    async def find(self, submission_id: str) -> Submission | None:
        self._answer()
        return self.submissions.get(submission_id)

    async def stop(self, submission_id: str) -> None:
        self._answer()
        found = self.submissions.get(submission_id)
        # Like Ray: stopping a pending submission does nothing.
        if found is not None and found.status == RayStatus.RUNNING:
            self.set(submission_id, RayStatus.STOPPED)

    async def logs(self, submission_id: str) -> str:
        self._answer()
        return f"log of {submission_id}" if submission_id in self.submissions else ""

    async def cluster(self) -> Cluster:
        self._answer()
        placed = {name for name, found in self.submissions.items() if found.status == RayStatus.RUNNING}
        free, memory = self.free or self.total, self.largest_node_bytes
        node = Node("127.0.0.1", self.total, free, memory or 0)
        return Cluster(self.total, free, frozenset(placed), memory, (node,))

    def set(self, submission_id: str, status: RayStatus, message: str = "") -> None:
        """Set the status of a submission."""
        self.submissions[submission_id] = Submission(status, message)

    def lose_everything(self) -> None:
        """Forget all submissions, like a restart of the head."""
        self.submissions.clear()

    def _answer(self) -> None:
        if self.is_down:
            raise UpstreamUnavailable("Ray did not answer")


@dataclass
class FakeMlflow:
    """In-memory tracking server."""

    runs: dict[str, str] = field(default_factory=dict)
    """Status by run id."""
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    publications: dict[str, Publication] = field(default_factory=dict)
    """Last publication by run id."""
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

    async def metric_names(self, run_id: str) -> list[str]:
        self._answer()
        return sorted(metric for run, metric in self.curves if run == run_id)

    async def publish(self, run_id: str, publication: Publication) -> None:
        self._answer()
        if run_id in self.runs:
            self.publications[run_id] = publication

    async def check(self) -> None:
        self._answer()

    def _start(self, run_id: str) -> RunAddress:
        self._answer()
        self.runs[run_id] = "running"
        return RunAddress(run_id, "1")

    def _answer(self) -> None:
        if self.is_down:
            raise UpstreamUnavailable("MLflow did not answer")
