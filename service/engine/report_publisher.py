"""Publisher of finished reports to the parent runs in MLflow."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.adapters.mlflow import MlflowRuns
from service.adapters.mlflow_values import Publication, metric_name
from service.domain.comparisons import Comparison
from service.domain.effects import Measure
from service.domain.errors import UpstreamUnavailable
from service.domain.mlflow_views import comparison_url
from service.domain.reports import ComparisonReport
from service.domain.variants import PRIMARY
from service.engine.comparison_reports import ComparisonReports
from service.rendering.content import ReportContent
from service.rendering.figures import figure_files

logger = logging.getLogger(__name__)
Writers = Mapping[str, Callable[[ReportContent], str]]
"""Functions that write a report, by the suffix of the file."""

DESCRIPTION = "md"
"""Suffix of the report that is the run's description, without its heading, which is the run's name."""
SUMMARY: tuple[Measure, ...] = (PRIMARY, "best", "final")
MAX_SUMMARY_VARIANTS = 50
"""Maximum number of variants in the summary; MLflow's page of a run draws a card per metric."""
TIMEOUT_SECONDS = 60.0
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 5.0, 300.0
GIVE_UP_SECONDS = 3_600.0
"""Time after the first failure from which the run is closed without a report."""


@dataclass
class _Failures:
    """Failures of a publication, by the monotonic clock."""

    first_at: float
    next_at: float
    pause_seconds: float = MIN_PAUSE_SECONDS


class ReportPublisher:
    """Publisher of reports to MLflow: each once, and again if it was interrupted."""

    def __init__(
        self,
        reports: ComparisonReports,
        mlflow: MlflowRuns,
        writers: Writers,
        public_url: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reports, self._mlflow, self._writers = reports, mlflow, writers
        self._public_url, self._clock = public_url, clock
        self._failures: dict[str, _Failures] = {}

    async def publish(self, comparison: Comparison) -> bool:
        """Publish the report of a finished comparison; return whether that is settled.

        After a failure it returns False, and does nothing until a growing pause is over. It gives up after an
        hour, and at once if the report cannot be made, for MLflow must not keep a comparison open for ever.
        """
        failures = self._failures.get(comparison.id)
        if comparison.mlflow_run_id is None:
            return True
        if failures is not None and self._clock() < failures.next_at:
            return False
        try:
            await self._publish(comparison, comparison.mlflow_run_id)
        except (UpstreamUnavailable, TimeoutError) as error:
            return self._note(comparison, error)
        except Exception:  # of any kind: a retry would fail in the same way
            logger.exception("%s: its report could not be published", comparison.id)
        self._failures.pop(comparison.id, None)
        return True

    def _note(self, comparison: Comparison, error: Exception) -> bool:
        now = self._clock()
        failures = self._failures.setdefault(comparison.id, _Failures(first_at=now, next_at=now))
        reason = str(error) or f"no answer within {TIMEOUT_SECONDS:.0f} s"
        if now - failures.first_at >= GIVE_UP_SECONDS:
            logger.warning("%s: its report is not published: %s", comparison.id, reason)
            del self._failures[comparison.id]
            return True
        logger.warning("%s: its report could not be published, to be retried: %s", comparison.id, reason)
        failures.next_at = now + failures.pause_seconds
        failures.pause_seconds = min(2 * failures.pause_seconds, MAX_PAUSE_SECONDS)
        return False

    async def _publish(self, comparison: Comparison, run_id: str) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            content = await self._reports.content(
                comparison,
                f"{self._public_url}/comparisons/{comparison.id}",
                comparison_url(f"{self._public_url}/mlflow", comparison),
            )
        # Without a limit, which would not end the thread: its work is bounded by the size of the report.
        publication = await asyncio.to_thread(publication_of, content, self._writers)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self._mlflow.publish(run_id, publication)


def publication_of(content: ReportContent, writers: Writers) -> Publication:
    """Return a report as the parent run shows it."""
    report = content.report
    ends = [run.job.ended_at for result in report.variants for run in result.runs if run.job.ended_at]
    files = {f"report.{suffix}": write(content) for suffix, write in writers.items()}
    return Publication(
        description=re.sub(r"^# .*\n+", "", files[f"report.{DESCRIPTION}"]),
        metrics=summary(report),
        files={path: text.encode() for path, text in (files | figure_files(content)).items()},
        at=max(ends, default=report.comparison.created_at),
    )


def summary(report: ComparisonReport) -> dict[str, float]:
    """Return the medians of each variant, and its ratio of steps to the baseline."""
    values: dict[str, float] = {}
    for result in report.variants[:MAX_SUMMARY_VARIANTS]:
        for name in SUMMARY:
            if (spread := result.measures[name]) is not None:
                values[f"{result.label}/{name}"] = spread.median
        # A lower bound is known; without one the ratio is at least 0, which says nothing.
        if (effect := result.effects.get(PRIMARY)) is not None and effect.estimate.low > 0:
            values[f"{result.label}/ratio_of_steps"] = effect.estimate.low
    return {metric_name(name): value for name, value in values.items() if math.isfinite(value)}
