import asyncio

import pytest

from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.recipes import Claim
from service.engine.comparison_reports import ComparisonReports
from service.store.jobs import JobStore
from tests.fakes import FakeMlflow
from tests.service.domain.recipe_factory import FASTER, make_recipe
from tests.service.examples import make_comparison, make_job
from trainer.jobspec import TRAIN_SECONDS, JobSpec


class CountingMlflow(FakeMlflow):
    """FakeMlflow that counts how often it is read."""

    reads = 0

    async def curve(self, run_id, metric):
        self.reads += 1
        return await super().curve(run_id, metric)


@pytest.fixture
def mlflow():
    return CountingMlflow()


@pytest.fixture
def reports(database, mlflow):
    return ComparisonReports(JobStore(database), mlflow)


@pytest.fixture
async def comparison(database, replica, mlflow):
    comparison = make_comparison(target=0.8)
    jobs = [
        make_job(
            spec=JobSpec(steps=2_000, num_workers=1, seed=seed),
            variant={"norm": norm, "seed": seed},
            state=JobState.SUCCEEDED,
            comparison_id=comparison.id,
            mlflow_run_id=f"{norm}-{seed}",
            mlflow_closed=True,
        )
        for norm in ("none", "sync")
        for seed in range(3)
    ]
    await replica.comparisons.add(comparison, jobs)
    for norm, step in (("none", 1000), ("sync", 100)):
        for seed in range(3):
            mlflow.curves[f"{norm}-{seed}", "accuracy"] = [(0, 0.1), (step - 10, 0.5), (step, 0.85)]
            mlflow.curves[f"{norm}-{seed}", TRAIN_SECONDS] = [(0, 0.0), (step, step * 0.01)]
    return comparison


async def test_a_report_is_made_of_curves_and_seconds(reports, comparison):
    report = await reports.report(comparison)
    assert [result.verdict for result in report.variants] == ["baseline", "faster"]
    assert report.variants[1].measures["seconds_to_target"].median == pytest.approx(1.0)
    assert report.variants[1].measures["seconds_per_step"].median == pytest.approx(0.01)
    assert report.conclusion.best == "norm=sync"


async def test_readers_at_the_same_time_share_the_work(reports, comparison, mlflow):
    first, second = await asyncio.gather(*[reports.content(comparison, "", None) for _ in range(2)])
    assert first.report is second.report
    assert mlflow.reads == 12


async def test_work_in_progress_ends_with_the_service(reports, comparison, mlflow):
    waiting = asyncio.create_task(reports.report(comparison))
    await asyncio.sleep(0)
    await reports.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_an_error_is_not_shared_with_later_readers(reports, comparison, mlflow):
    mlflow.is_down = True
    with pytest.raises(UpstreamUnavailable):
        await reports.report(comparison)
    mlflow.is_down = False
    assert (await reports.report(comparison)).finished


async def test_reports_of_finished_comparisons_are_cached(reports, comparison, mlflow):
    first = await reports.report(comparison)
    reads, mlflow.is_down = mlflow.reads, True
    assert await reports.report(comparison) is first
    assert mlflow.reads == reads == 12


async def test_reports_of_unfinished_comparisons_are_not_cached(reports, comparison, mlflow, replica):
    await replica.comparisons.add(other := make_comparison(), [make_job(comparison_id=other.id)])
    await reports.report(other)
    mlflow.is_down = True
    await replica.tick()
    with pytest.raises(UpstreamUnavailable):
        await reports.curves(comparison, "accuracy")


async def test_a_claim_is_judged_by_its_metrics(reports, comparison):
    claim = Claim.model_validate(make_recipe(FASTER).model_dump(mode="json", include=set(Claim.model_fields)))
    verdict = await reports.verdict(comparison, claim)
    assert verdict.judgement == "holds"


async def test_curves_of_any_metric(reports, comparison):
    found = await reports.curves(comparison, TRAIN_SECONDS)
    assert [points[-1][1] for _, points in found] == pytest.approx([10.0] * 3 + [1.0] * 3)
