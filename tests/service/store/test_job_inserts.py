from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import NotFound, QuotaExceeded
from service.domain.jobs import JobState, Transition
from service.store.comparisons import ComparisonStore
from service.store.jobs import JobStore
from service.store.retention import RetentionStore
from service.store.usage import add_stored_bytes
from tests.service.examples import make_comparison, make_job


async def test_if_one_job_cannot_be_stored_nothing_is(database, jobs):
    comparisons = ComparisonStore(database)
    comparison = make_comparison()
    twice = make_job(comparison_id=comparison.id)
    with pytest.raises(Exception, match=r"(?i)unique"):
        await comparisons.add(comparison, [twice, twice])
    with pytest.raises(NotFound):
        await comparisons.get(comparison.id)
    assert await jobs.page(10, None) == ([], None)


async def test_an_owner_stores_no_more_than_the_quota_and_deletion_frees_it(database):
    jobs = JobStore(database, 5_000)
    stored = make_job(owner="bob")
    await jobs.add(stored)
    large = make_job(owner="bob", variant={"junk": "x" * 2_000})
    with pytest.raises(
        QuotaExceeded, match=r"the jobs of bob would take [\d,]+ bytes in the database; at most 5,000"
    ):
        await jobs.add(large)
    with pytest.raises(NotFound):
        await jobs.get(large.id)
    await jobs.add(make_job(owner="ann", variant={"junk": "x" * 1_000}))
    async with database.write() as connection:
        left = await add_stored_bytes(connection, "bob", 0)
        assert left == len(stored.spec.model_dump_json()) + 2 + 1_000
    await jobs.advance(stored, Transition(state=JobState.CANCELLED, reason="test"), "test")
    cancelled = await jobs.get(stored.id)
    await jobs.update_fields(cancelled, mlflow_closed=True)
    assert await RetentionStore(database).delete_jobs(datetime.now(UTC) + timedelta(seconds=1), 10) == 1
    async with database.write() as connection:
        assert await add_stored_bytes(connection, "bob", 0) == 0
