"""Reports and verdicts of comparisons, from the runs in MLflow."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cachetools import TTLCache

from service.adapters.mlflow import MlflowRuns
from service.adapters.mlflow_curves import read_curves
from service.adapters.mlflow_values import git_commit
from service.domain.comparisons import Comparison
from service.domain.jobs import JobSummary
from service.domain.recipes import Claim
from service.domain.reports import ComparisonReport, make_report, request_of
from service.domain.statistics import Curve
from service.domain.verdicts import RecipeVerdict, finished_runs, judge
from service.rendering.content import (
    LayerPercentiles,
    ReportContent,
    natural_order,
    parse_percentiles,
    percentile_band,
)
from service.store.jobs import JobStore
from trainer.jobspec import TRAIN_SECONDS

MAX_CACHED_POINTS = 1_000_000
CACHE_SECONDS = 3_600
RECENT_SECONDS, MAX_RECENT = 3, 64
"""Time and number of shared reports of unfinished comparisons."""
PACKAGES = ("syncbn", "torch", "ray", "mlflow")
"""Packages whose versions a report names."""


@dataclass(frozen=True)
class _Extras:
    """Results of further metrics."""

    verdict: RecipeVerdict | None
    percentiles: Sequence[LayerPercentiles]


@dataclass
class _Entry:
    """Work of one comparison that its readers share."""

    report: "asyncio.Task[ComparisonReport]"
    extras: "asyncio.Task[_Extras] | None" = None
    size: int = 1


class ComparisonReports:
    """Reports of comparisons, made from the curves in MLflow.

    Readers of the same comparison share the work: that of a finished comparison for an hour, that of another
    one for some seconds.
    """

    def __init__(self, jobs: JobStore, mlflow: MlflowRuns) -> None:
        self._jobs, self._mlflow = jobs, mlflow
        self._finished: TTLCache[str, _Entry] = TTLCache(
            MAX_CACHED_POINTS, CACHE_SECONDS, getsizeof=lambda entry: entry.size
        )
        self._recent: TTLCache[str, _Entry] = TTLCache(MAX_RECENT, RECENT_SECONDS)

    async def report(self, comparison: Comparison) -> ComparisonReport:
        """Return the report of a comparison. Raises UpstreamUnavailable."""
        return await asyncio.shield(self._entry(comparison).report)

    async def close(self) -> None:
        """End the work in progress."""
        entries = [*self._recent.values(), *self._finished.values()]
        tasks = [task for entry in entries for task in (entry.report, entry.extras) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _entry(self, comparison: Comparison) -> _Entry:
        entry = self._finished.get(comparison.id) or self._recent.get(comparison.id)
        if entry is None or _has_failed(entry.report):
            entry = _Entry(asyncio.create_task(self._read(comparison)))
            entry.report.add_done_callback(lambda task: self._keep(comparison.id, entry))
            self._recent[comparison.id] = entry
        return entry

    def _keep(self, comparison_id: str, entry: _Entry) -> None:
        """Keep the work of a finished comparison."""
        if _has_failed(entry.report):
            return
        runs = [run for result in entry.report.result().variants for run in result.runs]
        entry.size = 1 + sum(len(run.metric) + len(run.seconds) for run in runs)
        # The trainer uploads the last metrics before a job ends, and nobody writes to a closed run.
        if all(run.job.mlflow_closed for run in runs) and entry.size < MAX_CACHED_POINTS:
            self._finished[comparison_id] = entry

    async def _read(self, comparison: Comparison) -> ComparisonReport:
        jobs = await self._jobs.list_by_comparison(comparison.id)
        specs = await self._jobs.specs_of(comparison.id)
        curves, seconds = await asyncio.gather(
            read_curves(jobs, comparison.metric, self._mlflow), read_curves(jobs, TRAIN_SECONDS, self._mlflow)
        )
        return await asyncio.to_thread(make_report, comparison, jobs, specs, curves, seconds)

    async def verdict(self, comparison: Comparison, claim: Claim) -> RecipeVerdict:
        """Return the verdict on the claim of a comparison. Raises UpstreamUnavailable."""
        jobs = await self._jobs.list_by_comparison(comparison.id)
        curves = {metric: await read_curves(jobs, metric, self._mlflow) for metric in sorted(claim.metrics())}
        return await asyncio.to_thread(lambda: judge(claim, finished_runs(jobs, curves)))

    async def content(self, comparison: Comparison, page_url: str, mlflow_url: str | None) -> ReportContent:
        """Return all that the documents of a comparison show. Raises UpstreamUnavailable."""
        entry = self._entry(comparison)
        report = await asyncio.shield(entry.report)
        claim = None if comparison.recipe is None else Claim.model_validate(comparison.recipe)
        if entry.extras is None or _has_failed(entry.extras):
            entry.extras = asyncio.create_task(self._read_extras(comparison, claim, report))
            entry.extras.add_done_callback(_has_failed)  # sees an error that no reader has waited for
        extras = await asyncio.shield(entry.extras)
        return ReportContent(
            report=report,
            claim=claim,
            verdict=extras.verdict,
            percentiles=extras.percentiles,
            environment=environment(),
            request=await asyncio.to_thread(request_of, report),
            page_url=page_url,
            mlflow_url=mlflow_url,
        )

    async def _read_extras(
        self, comparison: Comparison, claim: Claim | None, report: ComparisonReport
    ) -> _Extras:
        return _Extras(
            verdict=None if claim is None else await self.verdict(comparison, claim),
            percentiles=await self._percentiles(report),
        )

    async def _percentiles(self, report: ComparisonReport) -> list[LayerPercentiles]:
        """Return the percentiles of the deepest layer whose percentiles the runs logged."""
        logged = [run.job.mlflow_run_id for result in report.variants for run in result.runs if run.metric]
        names = await self._mlflow.metric_names(logged[0]) if logged and logged[0] else []
        found = parse_percentiles(names)
        if not found:
            return []
        (layer, unit), metrics = max(found.items(), key=lambda item: natural_order(" ".join(item[0])))
        jobs = [run.job for result in report.variants for run in result.runs]
        curves = {
            percent: await read_curves(jobs, metric, self._mlflow) for percent, metric in metrics.items()
        }
        bands = [
            percentile_band(
                result.label,
                {percent: [by_job[run.job.id] for run in result.runs] for percent, by_job in curves.items()},
            )
            for result in report.variants
        ]
        return [LayerPercentiles(layer=layer, unit=unit, variants=[band for band in bands if band.x])]

    async def curves(self, comparison: Comparison, metric: str) -> list[tuple[JobSummary, Curve]]:
        """Return one metric of all runs. Raises UpstreamUnavailable."""
        jobs = await self._jobs.list_by_comparison(comparison.id)
        curves = await read_curves(jobs, metric, self._mlflow)
        return [(job, curves[job.id]) for job in jobs]


def environment() -> dict[str, str]:
    """Return the versions of the main packages, and the commit of the code."""
    found = {"commit": git_commit()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _has_failed(task: "asyncio.Task[Any]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
