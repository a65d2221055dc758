import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import Conflict, NotFound, QuotaExceeded
from service.domain.jobs import JobState, Transition
from service.domain.leases import SCHEDULER, SHARDS, shard_of
from service.domain.retries import Blame, Failures
from service.store.comparisons import ComparisonStore
from service.store.jobs import Filter, JobStore
from service.store.leases import LeaseStore
from service.store.retention import RetentionStore
from service.store.tables import events
from service.store.tables import jobs as table
from service.store.usage import add_stored_bytes
from tests.service.examples import make_comparison, make_job, summary_of
from trainer.jobspec import JobSpec, Progress


@pytest.fixture
def jobs(database):
    return JobStore(database)


def to(state, **changes):
    return Transition(state=JobState(state), reason=f"now {state}", **changes)


async def test_what_is_stored_is_read_again(jobs):
    job = make_job(variant={"norm": "sync", "model.hidden": [3]})
    await jobs.add(job)
    assert await jobs.get(job.id) == job
    with pytest.raises(NotFound, match="job-0"):
        await jobs.get("job-0")


async def test_many_jobs_are_told_why_they_wait_while_they_do(database, jobs):
    lease = (await LeaseStore(database).keep("one", 5))[SCHEDULER]
    stored = [make_job() for _ in range(5)]
    for job in stored:
        await jobs.add(job)
    gone = await jobs.advance(stored[-1], to("submitted"), "one")
    await jobs.explain({job.id: "waits" for job in stored} | {stored[0].id: "waits for 4 CPUs"}, lease)
    told = [job.reason for job in (await jobs.page(len(stored), None))[0]]
    assert told == [gone.reason, *["waits"] * 3, "waits for 4 CPUs"]


async def test_pages_go_through_all_jobs_newest_first(jobs):
    stored = [make_job() for _ in range(5)]
    for job in stored:
        await jobs.add(job)
    seen, place = [], None
    while True:
        page, place = await jobs.page(2, place)
        seen += page
        if place is None:
            break
        await jobs.add(make_job())  # what comes meanwhile neither shifts the pages nor shows up
    assert seen == [summary_of(job) for job in stored[::-1]]


async def test_a_walk_leaves_its_events(jobs):
    job = make_job()
    await jobs.add(job)
    submitted = await jobs.advance(job, to("submitted"), "dispatcher")
    running = await jobs.advance(submitted, to("running"), "dispatcher")
    noted = await jobs.note(running, progress=Progress(step=3, total_steps=10, samples_per_second=1.5, eta_seconds=4))
    again = await jobs.advance(noted, to("queued", failures=Failures({Blame.HANG: 1})), "dispatcher")
    assert (again.attempt, again.started_at, again.failures.of(Blame.HANG)) == (2, None, 1)
    assert again.ran_seconds > 0
    assert await jobs.get(job.id) == again
    events = await jobs.events_of(job.id)
    assert [(event.state.value, event.attempt, event.actor) for event in events] == [
        ("queued", 1, "admin"),
        ("submitted", 1, "dispatcher"),
        ("running", 1, "dispatcher"),
        ("queued", 2, "dispatcher"),
    ]


async def test_what_an_owner_used_only_grows_also_when_jobs_are_deleted(database, jobs):
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
    assert used[first.owner].cpu_seconds == pytest.approx(ran_seconds * first.candidate().most.cpus)
    assert used[first.owner].gpu_seconds == 0
    async with database.write() as connection:
        await connection.execute(events.delete())
        await connection.execute(table.delete())
    assert (await jobs.totals()).usage == used


async def test_a_step_decided_on_an_old_state_is_refused_whole(jobs):
    job = make_job()
    await jobs.add(job)
    await jobs.request_cancel(job.id, "ann")
    assert await jobs.advance(job, to("submitted"), "dispatcher") is None
    assert await jobs.note(job, mlflow_run_id="x") is None
    assert (await jobs.get(job.id)).state == JobState.QUEUED
    assert [event.reason for event in await jobs.events_of(job.id)] == ["submitted by the user", "asked to cancel"]


async def test_of_many_who_advance_one_wins(jobs):
    job = make_job()
    await jobs.add(job)
    results = await asyncio.gather(*[jobs.advance(job, to("submitted"), str(n)) for n in range(8)])
    assert sum(result is not None for result in results) == 1


async def test_an_illegal_step_is_our_mistake(jobs):
    job = make_job()
    await jobs.add(job)
    with pytest.raises(AssertionError, match="queued -> succeeded"):
        await jobs.advance(job, to("succeeded"), "dispatcher")


async def test_cancelling_sets_a_wish_once(jobs):
    job = make_job()
    await jobs.add(job)
    first = await jobs.request_cancel(job.id, "ann")
    assert first.cancel_requested
    assert await jobs.request_cancel(job.id, "ann") == first
    cancelled = await jobs.advance(first, to("cancelled"), "dispatcher")
    assert await jobs.request_cancel(job.id, "ann") == cancelled
    with pytest.raises(NotFound):
        await jobs.request_cancel("job-0", "ann")


async def test_what_has_ended_otherwise_cannot_be_cancelled(jobs):
    job = make_job(state=JobState.SUBMITTED)
    await jobs.add(job)
    await jobs.advance(job, to("succeeded"), "dispatcher")
    with pytest.raises(Conflict, match="already succeeded"):
        await jobs.request_cancel(job.id, "ann")


async def test_unsettled_jobs_are_those_whose_end_mlflow_does_not_know(jobs):
    done, ended = [make_job(state=JobState.FAILED, mlflow_closed=closed) for closed in (True, False)]
    long_ago = datetime.now(UTC) - timedelta(seconds=4)
    waiting, limited = make_job(queue_seconds=60.0), make_job(queue_seconds=3.0, created_at=long_ago)
    again = make_job(queue_seconds=3.0, created_at=long_ago, attempt=2)
    running = make_job(state=JobState.RUNNING)
    for job in (done, ended, waiting, limited, again, running):
        await jobs.add(job)
    assert await jobs.open_jobs(range(SHARDS)) == [ended, limited, running]
    assert await jobs.open_jobs([shard_of(running.id)]) == [
        job for job in (ended, limited, running) if shard_of(job.id) == shard_of(running.id)
    ]


async def test_the_queue_is_what_waits_and_what_is_with_ray(jobs):
    waiting, cancelled, active = make_job(priority=3), make_job(), make_job(state=JobState.SUBMITTED, owner="bob")
    for job in (waiting, cancelled, active, make_job(state=JobState.FAILED)):
        await jobs.add(job)
    await jobs.request_cancel(cancelled.id, "ann")
    key = f"{waiting.id}:1"
    queue = await jobs.queue()
    assert (queue.waiting, queue.active) == ({key: waiting.candidate()}, [active.candidate()])
    assert queue.reasons == {waiting.id: "submitted by the user"}
    later = make_job()
    await jobs.add(later)
    known = {key: replace(waiting.candidate(), priority=7)}  # what is known is taken as it is
    again = await jobs.queue(known)
    assert again.waiting == known | {f"{later.id}:1": later.candidate()}
    assert again.reasons.keys() == {later.id}


async def test_lists_are_filtered(jobs):
    sync = make_job(owner="bob", tags=("a", "b"), spec=JobSpec(steps=1, norm="sync"))
    plain = make_job(tags=("b",), spec=JobSpec(steps=1, norm="none"), state=JobState.RUNNING)
    for job in (sync, plain):
        await jobs.add(job)
    for wanted, found in [
        (Filter(), [plain, sync]),
        (Filter(owner="bob"), [sync]),
        (Filter(state=JobState.RUNNING), [plain]),
        (Filter(norm="sync"), [sync]),
        (Filter(tag="b"), [plain, sync]),
        (Filter(tag="a"), [sync]),
        (Filter(tag="a", owner="admin"), []),
    ]:
        assert await jobs.page(10, None, wanted) == ([summary_of(job) for job in found], None)


async def test_a_comparison_and_its_jobs_are_stored_together(database, jobs):
    comparisons = ComparisonStore(database)
    comparison = make_comparison()
    mine = [make_job(comparison_id=comparison.id) for _ in range(3)]
    await comparisons.add(comparison, mine)
    assert await comparisons.get(comparison.id) == comparison
    assert await jobs.list_by_comparison(comparison.id) == [summary_of(job) for job in mine]
    assert await comparisons.open_jobs() == [comparison]
    await comparisons.note(comparison.id, mlflow_run_id="r", mlflow_experiment_id="1", mlflow_closed=True)
    assert (await comparisons.get(comparison.id)).mlflow_run_id == "r"
    assert await comparisons.open_jobs() == []
    with pytest.raises(NotFound):
        await comparisons.get("comparison-0")


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
    with pytest.raises(QuotaExceeded, match=r"the jobs of bob would take [\d,]+ bytes in the database; at most 5,000"):
        await jobs.add(large)
    with pytest.raises(NotFound):
        await jobs.get(large.id)
    await jobs.add(make_job(owner="ann", variant={"junk": "x" * 1_000}))
    async with database.write() as connection:
        left = await add_stored_bytes(connection, "bob", 0)
        assert left == len(stored.spec.model_dump_json()) + 2 + 1_000
    await jobs.advance(stored, Transition(state=JobState.CANCELLED, reason="test"), "test")
    cancelled = await jobs.get(stored.id)
    await jobs.note(cancelled, mlflow_closed=True)
    assert await RetentionStore(database).forget_jobs(datetime.now(UTC) + timedelta(seconds=1), 10) == 1
    async with database.write() as connection:
        assert await add_stored_bytes(connection, "bob", 0) == 0
