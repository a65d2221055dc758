"""MLflow client of the service: one run per job under a parent run.

Every call may be repeated: a run is looked up by the tag that carries our identifier before it is made.
"""

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from service.adapters.mlflow_values import (
    MAX_PARAM_CHARS,
    MAX_TAG_CHARS,
    Publication,
    curve_of,
    fit,
    flatten,
    git_commit,
    split_long,
)
from service.domain.comparisons import Comparison, describe, without_seed
from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import Job, JobState
from service.domain.mlflow_views import experiment_note, saved_view, view_tag
from service.domain.statistics import Curve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXPERIMENT_OF_SINGLE_JOBS = "jobs"
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "RESOURCE_ALREADY_EXISTS")
"""Error codes that a retry does not change."""
JOB_TAG, COMPARISON_TAG, PARENT_TAG = "syncbn.job_id", "syncbn.comparison_id", "mlflow.parentRunId"
NOTE_TAG, KIND_TAG = "mlflow.note.content", "mlflow.experimentKind"
TRAINING = "custom_model_development"
"""Kind of an experiment whose pages MLflow opens on runs instead of traces."""
NOTE_OF_SINGLE_JOBS = "Jobs that belong to no comparison."
REPORT_FILE = "report.md"
METRICS_PER_CALL = 500
PUBLISH_TIMEOUT_SECONDS = 60.0
"""Timeout of a publication, which uploads files."""
THREADS = 8
"""Threads for calls to MLflow only, so that calls that hang do not block other work of the service."""
MLFLOW_STATUS = {JobState.SUCCEEDED: "FINISHED", JobState.FAILED: "FAILED", JobState.CANCELLED: "KILLED"}

T = TypeVar("T")


@dataclass(frozen=True)
class RunAddress:
    """Identifiers of a run."""

    run_id: str
    experiment_id: str


class MlflowRuns(Protocol):
    """Interface to runs in MLflow.

    All calls raise UpstreamUnavailable after a timeout.
    """

    async def start_comparison(self, comparison: Comparison) -> RunAddress:
        """Find or create the parent run of a comparison, in the experiment of its name."""

    async def start_job(self, job: Job, comparison: Comparison | None) -> RunAddress:
        """Find or create the run of a job, with its spec as params, and tag the attempt."""

    async def finish(self, run_id: str, state: JobState) -> None:
        """Record a terminal state."""

    async def curve(self, run_id: str, metric: str) -> Curve:
        """Read a metric by step; empty if the run does not have it."""

    async def metric_names(self, run_id: str) -> list[str]:
        """Return the names of the metrics of a run; empty if it is deleted."""

    async def publish(self, run_id: str, publication: Publication) -> None:
        """Describe a run by its result; no effect on a deleted run, and none if repeated."""

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
                # MLflow's own defaults, 7 retries of 120 seconds, would keep the dispatcher waiting for
                # minutes.
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
                if self._secret is not None:  # MLflow's client reads it from here alone, at each request
                    os.environ["MLFLOW_TRACKING_TOKEN"] = self._secret
                os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # noise in the service's log
                from mlflow import MlflowClient

                # All modules are loaded now. Without them a full garbage collection, for which all requests
                # wait, takes less than 0.1 ms instead of 302 ms (docs/lab-book.md).
                gc.collect()
                gc.freeze()
                self._loaded = MlflowClient(self._url)
            return self._loaded

    async def start_comparison(self, comparison: Comparison) -> RunAddress:
        """Find or create the parent run of a comparison, in the experiment of its name."""
        tags = {
            COMPARISON_TAG: comparison.id,
            "baseline": describe(comparison.baseline),
            "metric": comparison.metric,
        }
        note = experiment_note(comparison)

        def start() -> RunAddress:
            address = self._start(comparison.name, note, comparison.name, COMPARISON_TAG, tags)
            view = {view_tag(comparison): saved_view(comparison, address.run_id)}
            self._tag_experiment(self._client.get_experiment(address.experiment_id), view)
            return address

        return await self._call(start)

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
            # Without the seed, so that grouping by this tag gives the mean over seeds of each variant.
            tags |= {COMPARISON_TAG: comparison.id, "variant": describe(without_seed(job.variant))}
            if comparison.mlflow_run_id:
                tags[PARENT_TAG] = comparison.mlflow_run_id
        experiment = comparison.name if comparison else EXPERIMENT_OF_SINGLE_JOBS
        note = experiment_note(comparison) if comparison else NOTE_OF_SINGLE_JOBS
        params = flatten(spec.model_dump(mode="json"))
        return await self._call(lambda: self._start(experiment, note, job.name, JOB_TAG, tags, params))

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
        return curve_of({point.step: point.value for point in history})

    async def metric_names(self, run_id: str) -> list[str]:
        """Return the names of the metrics of a run; empty if it is deleted."""
        return await self._call(
            lambda: self._unless_gone([], lambda: sorted(self._client.get_run(run_id).data.metrics))
        )

    async def publish(self, run_id: str, publication: Publication) -> None:
        """Describe a run by its result; no effect on a deleted run, and none if repeated."""
        await self._call(
            lambda: self._unless_gone(None, lambda: self._publish(run_id, publication)),
            PUBLISH_TIMEOUT_SECONDS,
        )

    async def check(self) -> None:
        """Check that MLflow answers."""
        await self._call(lambda: self._client.search_experiments(max_results=1))

    def _start(
        self,
        experiment: str,
        note: str,
        name: str,
        key: str,
        tags: dict[str, str],
        params: dict[str, Any] | None = None,
    ) -> RunAddress:
        # A call that timed out continues in its thread; the next one must not look before it is done.
        with self._starting:
            experiment_id = self._experiment(experiment, {KIND_TAG: TRAINING, NOTE_TAG: note})
            tags = tags | {"git_commit": git_commit()}
            return RunAddress(
                self._find_or_create(experiment_id, name, key, tags, params or {}), experiment_id
            )

    def _find_or_create(
        self, experiment_id: str, name: str, key: str, tags: dict[str, str], params: dict[str, Any]
    ) -> str:
        from mlflow.entities import Param, Run, RunTag

        found = self._client.search_runs([experiment_id], f"tags.`{key}` = '{tags[key]}'", max_results=10)
        # A job's run carries its comparison's tag too: the parent is the one that has no parent.
        runs: list[Run] = [run for run in found if key == JOB_TAG or JOB_TAG not in run.data.tags]
        stored_tags, long_tags = split_long(tags, MAX_TAG_CHARS)
        stored_params, long_params = split_long(params, MAX_PARAM_CHARS)
        run = runs[0] if runs else self._client.create_run(experiment_id, run_name=name, tags=stored_tags)
        run_id = str(run.info.run_id)
        if runs:
            self._client.update_run(run_id, status="RUNNING")
        for path, text in (long_tags | long_params).items():
            self._client.log_text(run_id, text, path)
        # Logging the same params and tags again changes nothing.
        self._client.log_batch(
            run_id,
            params=[Param(path, value) for path, value in stored_params.items()],
            tags=[RunTag(tag, value) for tag, value in stored_tags.items()],
        )
        return run_id

    def _experiment(self, name: str, tags: Mapping[str, str]) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, tags=dict(tags)))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        self._tag_experiment(found, tags)
        return str(found.experiment_id)

    def _tag_experiment(self, experiment: "Experiment", tags: Mapping[str, str]) -> None:
        for tag, value in tags.items():
            if experiment.tags.get(tag) != value:
                self._client.set_experiment_tag(experiment.experiment_id, tag, value)

    def _publish(self, run_id: str, publication: Publication) -> None:
        from mlflow.entities import Metric

        # The description is last: it names files, which then exist.
        with TemporaryDirectory(prefix="syncbn-report-") as folder:
            for path, content in publication.files.items():
                file = Path(folder, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            self._client.log_artifacts(run_id, folder)
        at = int(publication.at.timestamp() * 1_000)
        metrics = [Metric(name, value, at, 0) for name, value in publication.metrics.items()]
        for first in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_CALL])
        rest = f"The rest is in the artifact `{REPORT_FILE}`."
        self._client.set_tag(run_id, NOTE_TAG, fit(publication.description, MAX_TAG_CHARS, rest))

    @staticmethod
    def _unless_gone(otherwise: T, work: Callable[[], T]) -> T:
        from mlflow.exceptions import MlflowException

        try:
            return work()
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" or "deleted" in str(error):
                return otherwise
            raise

    async def _call(self, work: Callable[[], T], timeout_seconds: float | None = None) -> T:
        try:
            async with asyncio.timeout(timeout_seconds or self._timeout_seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._try, work)
        except TimeoutError as error:
            raise UpstreamUnavailable(f"MLflow at {self._url} did not answer in time") from error

    def _try(self, work: Callable[[], T]) -> T:
        # Imports MLflow, one thread at a time: a module that another thread is importing is not complete.
        _ = self._client
        from mlflow.exceptions import MlflowException
        from requests import RequestException

        try:
            return work()
        except MlflowException as error:
            if error.error_code in REFUSALS:
                raise UpstreamRejected(f"MLflow refused: {error}") from error
            raise UpstreamUnavailable(f"MLflow at {self._url}: {error}") from error
        except RequestException as error:  # of an upload
            raise UpstreamUnavailable(f"MLflow at {self._url}: {error}") from error
