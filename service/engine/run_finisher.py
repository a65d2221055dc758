"""End of MLflow runs: closes the runs of ended jobs and comparisons."""

import logging
import time

from service.adapters.run_storage import on_storage
from service.domain.comparisons import Comparison
from service.domain.errors import UpstreamRejected
from service.domain.jobs import Job, JobState
from service.domain.leases import Lease
from service.engine.report_publisher import ReportPublisher
from service.engine.submitter import Upstreams
from service.store.comparisons import ComparisonStore
from service.store.jobs import JobStore

logger = logging.getLogger(__name__)
MAX_SECONDS = 60.0
"""Time after which no further comparison is begun in one call."""


class RunFinisher:
    """Finisher of MLflow runs."""

    def __init__(
        self,
        jobs: JobStore,
        comparisons: ComparisonStore,
        upstreams: Upstreams,
        publisher: ReportPublisher,
    ) -> None:
        self._jobs, self._comparisons, self._publisher = jobs, comparisons, publisher
        self._mlflow, self._files = upstreams.mlflow, upstreams.files

    async def finish_job(self, job: Job, lease: Lease) -> None:
        """Set the end of an ended job in MLflow."""
        if job.mlflow_run_id is not None:
            await on_storage(self._files.close_attempts, job)
            await self._mlflow.finish(job.mlflow_run_id, job.state)
        await self._jobs.update_fields(job, lease, mlflow_closed=True)

    async def finish_comparisons(self) -> None:
        """Publish the reports of comparisons whose jobs have ended; close their runs."""
        began = time.monotonic()
        for comparison in await self._comparisons.open_comparisons():
            if time.monotonic() - began > MAX_SECONDS:
                return
            try:
                await self._finish_comparison(comparison)
            except UpstreamRejected as error:  # must not delay the others
                logger.warning("%s: %s", comparison.id, error)

    async def _finish_comparison(self, comparison: Comparison) -> None:
        """Publish the report, and close the parent run: failed if any job failed."""
        jobs = await self._jobs.list_by_comparison(comparison.id)
        if not all(job.mlflow_closed for job in jobs) or not await self._publisher.publish(comparison):
            return
        states = {job.state for job in jobs}
        if comparison.mlflow_run_id is not None:
            worst = next(s for s in (JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED) if s in states)
            await self._mlflow.finish(comparison.mlflow_run_id, worst)
        await self._comparisons.update_fields(comparison.id, mlflow_closed=True)
