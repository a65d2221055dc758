from datetime import UTC, date, datetime, timedelta

import pytest

from service.domain.jobs import JobState
from service.store.tables import events
from service.store.tables import jobs as table
from service.store.usage import Period, seconds_by_day
from tests.service.examples import make_job
from tests.service.store.stored import to
from trainer.jobspec import JobSpec


async def test_usage_of_an_owner_never_decreases(database, jobs):
    spec = JobSpec(steps=1, num_workers=3)
    first, second = make_job(spec=spec), make_job(spec=spec)
    ran_seconds = 0.0
    for job in (first, second):
        await jobs.add(job)
        for state in ("submitted", "running", "queued", "submitted", "running", "failed"):
            job = await jobs.advance(job, to(state), "dispatcher")
        ran_seconds += job.ran_seconds
    assert ran_seconds > 0
    used = (await jobs.totals()).usage
    assert used.keys() == {first.owner}
    assert used[first.owner].cpu_seconds == pytest.approx(
        ran_seconds * first.schedulable().max_resources.cpus
    )
    assert used[first.owner].gpu_seconds == 0
    async with database.write() as connection:
        await connection.execute(events.delete())
        await connection.execute(table.delete())
    assert (await jobs.totals()).usage == used
    assert await jobs.usage(Period()) == used


async def test_usage_counts_running_attempts_and_by_day(database, jobs, monkeypatch):
    start = datetime(2026, 3, 1, 23, 0, tzinfo=UTC)
    spec = JobSpec(steps=1, num_workers=2)
    ended = make_job(spec=spec, owner="ann", state=JobState.RUNNING, started_at=start)
    await jobs.add(ended)
    await jobs.add(make_job(spec=spec, owner="bob", state=JobState.RUNNING, started_at=start))
    now = start + timedelta(hours=26)

    class Clock(datetime):
        @classmethod
        def now(cls, zone):
            return now

    monkeypatch.setattr("service.store.jobs.datetime", Clock)
    # Preempted, and so back in the queue.
    assert await jobs.advance(ended, to("queued"), "dispatcher")
    for period, hours in [
        (Period(), 26),
        (Period(since=date(2026, 3, 2)), 25),
        (Period(until=date(2026, 3, 2)), 1),
        (Period(date(2026, 3, 2), date(2026, 3, 3)), 24),
        (Period(since=date(2026, 3, 4)), 0),
    ]:
        used = {owner: each.cpu_seconds / 7200 for owner, each in (await jobs.usage(period)).items()}
        assert {"ann": 0, "bob": 0} | used == {"ann": pytest.approx(hours), "bob": pytest.approx(hours)}
    now += timedelta(hours=2)
    assert {owner: each.cpu_seconds / 7200 for owner, each in (await jobs.totals()).usage.items()} == {
        "ann": pytest.approx(26), "bob": pytest.approx(28),
    }  # fmt: skip
    without_running = (await jobs.totals()).ended_usage
    assert {owner: each.cpu_seconds / 7200 for owner, each in without_running.items()} == {
        "ann": pytest.approx(26), "bob": 0,
    }  # fmt: skip
    stored = await jobs.get(ended.id)
    assert (stored.ran_seconds, stored.started_at) == (26 * 3600, None)


async def test_an_attempt_that_ends_before_its_start_uses_nothing(jobs):
    """The clock of the replica that ends it may be behind."""
    later = datetime.now(UTC) + timedelta(minutes=5)
    job = make_job(spec=JobSpec(steps=1, num_workers=2), state=JobState.RUNNING, started_at=later)
    await jobs.add(job)
    assert await jobs.advance(job, to("queued"), "dispatcher")
    assert (await jobs.totals()).ended_usage[job.owner].cpu_seconds == 0


def test_time_is_divided_by_days():
    start, day = datetime(2026, 3, 1, 12, tzinfo=UTC), timedelta(days=1)
    found = seconds_by_day(start, start + 2 * day)
    assert list(found.values()) == [43_200, 86_400, 43_200]
    assert seconds_by_day(start, start) == {}
