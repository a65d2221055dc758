import json
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import pytest

from service.api.report_files import WRITERS
from service.domain.errors import UpstreamRejected
from service.domain.jobs import JobState
from service.engine import report_publisher
from service.engine.comparison_reports import ComparisonReports
from service.engine.report_publisher import GIVE_UP_SECONDS, ReportPublisher, summary
from service.store.jobs import JobStore
from tests.fakes import FakeMlflow
from tests.service.examples import make_comparison, make_job
from trainer.jobspec import JobSpec

ENDED = datetime(2026, 3, 2, 10, tzinfo=UTC)


class Clock:
    """Clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def comparison(database, replica):
    """Finished comparison of two norms on three seeds."""
    comparison = make_comparison(mlflow_run_id="parent", mlflow_experiment_id="1")
    jobs = [
        make_job(
            spec=JobSpec(steps=2_000, num_workers=1, seed=seed),
            variant={"norm": norm, "seed": seed},
            state=JobState.SUCCEEDED,
            ended_at=ENDED,
            comparison_id=comparison.id,
            mlflow_run_id=f"{norm}-{seed}",
            mlflow_closed=True,
        )
        for norm in ("none", "sync")
        for seed in range(3)
    ]
    await replica.comparisons.add(comparison, jobs)
    return comparison


@pytest.fixture
def mlflow(replica):
    replica.mlflow.runs["parent"] = "running"
    for norm, step in (("none", 1000), ("sync", 100)):
        for seed in range(3):
            replica.mlflow.curves[f"{norm}-{seed}", "accuracy"] = [
                (0, 0.1),
                (step - 10, 0.5),
                (step, 0.85),
                (2000, 0.9),
            ]
    return replica.mlflow


def publisher_of(database, mlflow, clock, writers=WRITERS):
    return ReportPublisher(
        ComparisonReports(JobStore(database), mlflow), mlflow, writers, "http://syncbn.example", clock
    )


async def test_a_finished_comparison_gets_description_summary_and_files(database, comparison, mlflow, clock):
    publisher = publisher_of(database, mlflow, clock)
    assert await publisher.publish(comparison)
    found = mlflow.publications["parent"]
    assert found.description.startswith("**norm=sync is best: it needs 10 times fewer steps")
    assert found.files["report.md"].decode().endswith(found.description)
    assert found.metrics == {
        "norm_none/steps_to_target": 1000,
        "norm_none/best": 0.9,
        "norm_none/final": 0.9,
        "norm_sync/steps_to_target": 100,
        "norm_sync/best": 0.9,
        "norm_sync/final": 0.9,
        "norm_sync/ratio_of_steps": pytest.approx(10),
    }
    assert found.files.keys() == {
        "report.html",
        "report.md",
        "report.csv",
        "report.json",
        "figures/curves.svg",
        "figures/effects.svg",
    }
    assert json.loads(found.files["report.json"])["comparison_id"] == comparison.id
    assert found.at == ENDED
    assert await publisher.publish(comparison)
    assert mlflow.publications["parent"] == found  # nothing depends on when it is published


async def test_a_comparison_without_a_run_has_nothing_to_publish(database, comparison, mlflow, clock):
    assert await publisher_of(database, mlflow, clock).publish(replace(comparison, mlflow_run_id=None))


async def test_failures_are_retried_with_growing_pauses_for_an_hour(database, comparison, mlflow, clock):
    publisher, mlflow.is_down = publisher_of(database, mlflow, clock), True
    tries = []
    while not await publisher.publish(comparison):
        if not tries or publisher._failures[comparison.id].next_at > tries[-1]:
            tries.append(publisher._failures[comparison.id].next_at)
        clock.now += 1
        assert clock.now < 2 * GIVE_UP_SECONDS
    assert tries[:4] == [5, 15, 35, 75]
    assert max(after - before for before, after in pairwise(tries)) == 300
    assert GIVE_UP_SECONDS <= clock.now <= GIVE_UP_SECONDS + 300
    assert publisher._failures == {}


async def test_a_retry_succeeds_when_mlflow_answers_again(database, comparison, mlflow, clock):
    publisher, mlflow.is_down = publisher_of(database, mlflow, clock), True
    assert not await publisher.publish(comparison)
    mlflow.is_down = False
    assert not await publisher.publish(comparison)  # within the pause
    clock.now = 5
    assert await publisher.publish(comparison)
    assert "parent" in mlflow.publications


async def test_a_call_that_hangs_ends(database, comparison, mlflow, clock, monkeypatch):
    class Hanging(FakeMlflow):
        async def publish(self, run_id, publication):
            await report_publisher.asyncio.Event().wait()

    monkeypatch.setattr(report_publisher, "TIMEOUT_SECONDS", 0.3)
    assert not await publisher_of(database, Hanging(curves=mlflow.curves), clock).publish(comparison)


@pytest.mark.parametrize("error", [ValueError("a defect"), UpstreamRejected("MLflow refused: no")])
async def test_what_a_retry_does_not_change_is_not_retried(database, comparison, mlflow, clock, error):
    def fail(content):
        raise error

    assert await publisher_of(database, mlflow, clock, WRITERS | {"json": fail}).publish(comparison)
    assert "parent" not in mlflow.publications


async def test_a_bound_of_a_ratio_is_in_the_summary_only_if_it_says_something(database, comparison, mlflow):
    for seed in range(3):
        mlflow.curves[f"none-{seed}", "accuracy"] = [(0, 0.1), (2000, 0.2)]
    report = await ComparisonReports(JobStore(database), mlflow).report(comparison)
    assert summary(report)["norm_sync/ratio_of_steps"] == pytest.approx(20)
    for seed in range(3):
        mlflow.curves[f"none-{seed}", "accuracy"] = [(0, 0.1), (90, 0.5), (100, 0.9)]
        mlflow.curves[f"sync-{seed}", "accuracy"] = [(0, 0.1), (2000, 0.2)]
    report = await ComparisonReports(JobStore(database), mlflow).report(comparison)
    assert "norm_sync/ratio_of_steps" not in summary(report)
