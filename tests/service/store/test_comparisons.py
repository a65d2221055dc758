from dataclasses import replace

import pytest

from service.domain.errors import NotFound
from service.domain.jobs import JobState, Transition
from service.store.comparisons import ComparisonStore
from tests.service.examples import make_comparison, make_job, summary_of


async def test_a_comparison_and_its_jobs_are_stored_together(database, jobs):
    comparisons = ComparisonStore(database)
    comparison = make_comparison()
    mine = [make_job(comparison_id=comparison.id) for _ in range(3)]
    await comparisons.add(comparison, mine)
    assert await comparisons.get(comparison.id) == comparison
    assert await jobs.list_by_comparison(comparison.id) == [summary_of(job) for job in mine]
    assert await comparisons.open_comparisons() == [comparison]
    await comparisons.update_fields(
        comparison.id, mlflow_run_id="r", mlflow_experiment_id="1", mlflow_closed=True
    )
    assert (await comparisons.get(comparison.id)).mlflow_run_id == "r"
    assert await comparisons.open_comparisons() == []
    with pytest.raises(NotFound):
        await comparisons.get("comparison-0")


async def test_pages_have_the_newest_first_with_numbers_of_jobs_by_state(database, jobs):
    comparisons = ComparisonStore(database)
    made = [make_comparison(owner=owner, recipe={"claim": "x"}) for owner in ("ann", "bob", "ann")]
    for comparison in made:
        points = [make_job(comparison_id=comparison.id, owner=comparison.owner) for _ in range(2)]
        await comparisons.add(comparison, points)
    await jobs.advance(points[0], Transition(state=JobState.FAILED, reason="x"), "test")
    found, more = await comparisons.page(2, None)
    assert [each.comparison for each in found] == [
        replace(made[2], recipe=None),
        replace(made[1], recipe=None),
    ]
    assert found[0].jobs == {JobState.QUEUED: 1, JobState.FAILED: 1}
    (last,), end = await comparisons.page(2, more)
    assert (last.comparison.id, end) == (made[0].id, None)
    mine, _ = await comparisons.page(9, None, "ann")
    assert [each.comparison.id for each in mine] == [made[2].id, made[0].id]
