"""MLflow client of the service: one run per job under a parent run.

Every call may be repeated: a run is looked up by the tag that carries our identifier before it is made.
"""

import asyncio
import gc
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from service.domain.comparisons import Comparison, describe
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job, JobState, JobSummary
from service.domain.statistics import Curve

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT_OF_SINGLE_JOBS = "jobs"
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "RESOURCE_ALREADY_EXISTS")
"""Codes of answers that will be the same the next time."""
JOB_TAG, COMPARISON_TAG, PARENT_TAG = "syncbn.job_id", "syncbn.comparison_id", "mlflow.parentRunId"
THREADS = 8
"""Calls to MLflow at one time: threads of their own, so that calls that hang do not hold up the service's other work."""
MLFLOW_STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.FAILED: "FAILED", JobState.CANCELLED: "KILLED"}

T = TypeVar("T")


@dataclass(frozen=True)
class RunAddress:
    """Identifiers of a run."""

    run_id: str
    experiment_id: str


class MlflowRuns(Protocol):
    """Interface to runs in MLflow. All calls raise UpstreamUnavailable after a timeout."""

    async def start_comparison(self, comparison: Comparison) -> RunAddress:
        """Find or create the parent run of a comparison, in the experiment of its name."""

    async def start_job(self, job: Job, comparison: Comparison | None) -> RunAddress:
        """Find or create the run of a job, with its spec as params, and tag the attempt."""

    async def finish(self, run_id: str, state: JobState) -> None:
        """Record a terminal state."""

    async def curve(self, run_id: str, metric: str) -> Curve:
        """Read a metric by step; empty if the run does not have it."""

    async def check(self) -> None:
        """Check that MLflow answers."""


class MlflowRunsOverHttp:
    """MlflowRuns on an MLflow server."""

    def __init__(self, url: str, timeout_seconds: float, secret: str | None = None) -> None:
        self._url, self._timeout_seconds, self._secret = url, timeout_seconds, secret
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mlflow")
        self._starting = threading.Lock()
        self._loading = threading.Lock()
        self._loaded: MlflowClient | None = None

    @property
    def _client(self) -> "MlflowClient":
        """The client; call it in a thread, since MLflow takes seconds to import."""
        with self._loading:
            if self._loaded is None:
                # MLflow's own defaults, 7 retries of 120 seconds, would keep the dispatcher waiting for minutes.
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
                if self._secret is not None:  # MLflow's client reads it from here alone, at each request
                    os.environ["MLFLOW_TRACKING_TOKEN"] = self._secret
                os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # noise in the service's log
                from mlflow import MlflowClient

                # All modules are there now, and stay. Were they looked through for garbage, all requests would wait for a tenth of
                # a second each time.
                gc.collect()
                gc.freeze()
                self._loaded = MlflowClient(self._url)
            return self._loaded

    async def start_comparison(self, comparison: Comparison) -> RunAddress:
        """Find or create the parent run of a comparison, in the experiment of its name."""
        tags = {COMPARISON_TAG: comparison.id, "baseline": describe(comparison.baseline), "metric": comparison.metric}
        return await self._call(lambda: self._start(comparison.name, comparison.name, COMPARISON_TAG, tags))

    async def start_job(self, job: Job, comparison: Comparison | None) -> RunAddress:
        """Find or create the run of a job, with its spec as params, and tag the attempt."""
        spec = job.spec
        tags = {
            JOB_TAG: job.id,
            "norm": spec.norm.value,
            "seed": str(spec.seed),
            "attempt": str(job.attempt),
            "world_size": "-".join(map(str, sorted({spec.min_workers, spec.max_workers}))),
        }
        if comparison is not None:
            tags |= {COMPARISON_TAG: comparison.id, "variant": describe(job.variant)}
            if comparison.mlflow_run_id:
                tags[PARENT_TAG] = comparison.mlflow_run_id
        experiment = comparison.name if comparison else EXPERIMENT_OF_SINGLE_JOBS
        params = flatten(spec.model_dump(mode="json"))
        return await self._call(lambda: self._start(experiment, job.name, JOB_TAG, tags, params))

    async def finish(self, run_id: str, state: JobState) -> None:
        """Record a terminal state; a deleted run stays deleted."""
        await self._call(
            lambda: self._unless_gone(None, lambda: self._client.set_terminated(run_id, MLFLOW_STATUS[state]))
        )

    async def curve(self, run_id: str, metric: str) -> Curve:
        """Read a metric by step; empty if the run does not have it or is deleted."""
        history: list[Any] = await self._call(
            lambda: self._unless_gone([], lambda: self._client.get_metric_history(run_id, metric))
        )
        return sorted({point.step: point.value for point in history}.items())

    async def check(self) -> None:
        """Check that MLflow answers."""
        await self._call(lambda: self._client.search_experiments(max_results=1))

    def _start(
        self, experiment: str, name: str, key: str, tags: dict[str, str], params: dict[str, Any] | None = None
    ) -> RunAddress:
        # A call that took too long for whoever asked goes on in its thread: the next one must not look before it is done.
        with self._starting:
            return self._find_or_create(experiment, name, key, tags | {"git_commit": git_commit()}, params or {})

    def _find_or_create(
        self, experiment: str, name: str, key: str, tags: dict[str, str], params: dict[str, Any]
    ) -> RunAddress:
        from mlflow.entities import Param, Run, RunTag

        experiment_id = self._experiment(experiment)
        found = self._client.search_runs([experiment_id], f"tags.`{key}` = '{tags[key]}'", max_results=10)
        # A job's run carries its comparison's tag too: the parent is the one that has no parent.
        runs: list[Run] = [run for run in found if key == JOB_TAG or JOB_TAG not in run.data.tags]
        run = runs[0] if runs else self._client.create_run(experiment_id, run_name=name, tags=tags)
        run_id = str(run.info.run_id)
        if runs:
            self._client.update_run(run_id, status="RUNNING")
        # Logging the same params and tags again changes nothing.
        self._client.log_batch(
            run_id,
            params=[Param(path, str(value)) for path, value in params.items()],
            tags=[RunTag(tag, value) for tag, value in tags.items()],
        )
        return RunAddress(run_id, experiment_id)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    @staticmethod
    def _unless_gone(otherwise: T, work: Callable[[], T]) -> T:
        from mlflow.exceptions import MlflowException

        try:
            return work()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" or "deleted" in str(error):
                return otherwise
            raise

    async def _call(self, work: Callable[[], T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._try, work)
        except TimeoutError as error:
            raise UpstreamUnavailable(f"MLflow at {self._url} did not answer in time") from error

    def _try(self, work: Callable[[], T]) -> T:
        # Imports MLflow, one thread at a time: a module that another thread is importing is not complete.
        _ = self._client
        from mlflow.exceptions import MlflowException

        try:
            return work()
        except MlflowException as error:
            if error.error_code in REFUSALS:
                raise UpstreamRejected(f"MLflow refused: {error}") from error
            raise UpstreamUnavailable(f"MLflow at {self._url}: {error}") from error


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested fields to dotted paths such as `optimizer.lr`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@cache
def git_commit() -> str:
    """Return the commit of the running code, from SYNCBN_GIT_COMMIT or the checkout, or `unknown`."""
    if commit := os.environ.get("SYNCBN_GIT_COMMIT"):
        return commit
    root = Path(__file__).parents[2]
    # Installed into an environment inside some other repository, that one's commit would say nothing.
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


READS_AT_ONCE = 8


async def read_curves(jobs: Sequence[JobSummary], metric: str, mlflow: MlflowRuns) -> dict[str, Curve]:
    """Read a metric by job id; empty for jobs without a run or this metric."""
    gate = asyncio.Semaphore(READS_AT_ONCE)

    async def read(job: JobSummary) -> Curve:
        if job.mlflow_run_id is None:
            return []
        async with gate:
            return await mlflow.curve(job.mlflow_run_id, metric)

    curves = await asyncio.gather(*[read(job) for job in jobs])
    return dict(zip([job.id for job in jobs], curves, strict=True))
