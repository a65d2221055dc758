import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import Conflict, NotFound
from service.domain.jobs import JobState
from service.domain.leases import SCHEDULER, SHARDS, shard_of
from service.domain.retries import Failures, RetryGroup
from service.store.jobs import Filter
from service.store.leases import LeaseStore
from tests.service.examples import make_job, summary_of
from tests.service.store.stored import to
from trainer.jobspec import JobSpec, Progress


async def test_queue_reasons_are_set_only_while_jobs_are_queued(database, jobs):
    lease = (await LeaseStore(database).keep("one", 5))[SCHEDULER]
    stored = [make_job() for _ in range(5)]
    for job in stored:
        await jobs.add(job)
    gone = await jobs.advance(stored[-1], to("submitted"), "one")
    await jobs.set_queue_reasons(
        {job.id: "waits" for job in stored} | {stored[0].id: "waits for 4 CPUs"}, lease
    )
    reasons = [job.reason for job in (await jobs.page(len(stored), None))[0]]
    assert reasons == [gone.reason, *["waits"] * 3, "waits for 4 CPUs"]


async def test_pages_go_through_all_jobs_newest_first(jobs):
    stored = [make_job() for _ in range(5)]
    for job in stored:
        await jobs.add(job)
    seen, position = [], None
    while True:
        page, position = await jobs.page(2, position)
        seen += page
        if position is None:
            break
        await jobs.add(make_job())  # later jobs neither shift the pages nor appear
    assert seen == [summary_of(job) for job in stored[::-1]]


async def test_each_transition_is_an_event(jobs):
    job = make_job()
    await jobs.add(job)
    submitted = await jobs.advance(job, to("submitted"), "dispatcher")
    running = await jobs.advance(submitted, to("running"), "dispatcher")
    noted = await jobs.update_fields(
        running, progress=Progress(step=3, total_steps=10, samples_per_second=1.5, eta_seconds=4)
    )
    again = await jobs.advance(noted, to("queued", failures=Failures({RetryGroup.HANG: 1})), "dispatcher")
    assert (again.attempt, again.started_at, again.failures.of(RetryGroup.HANG)) == (2, None, 1)
    assert again.ran_seconds > 0
    assert await jobs.get(job.id) == again
    events = await jobs.events_of(job.id)
    assert [(event.state.value, event.attempt, event.actor) for event in events] == [
        ("queued", 1, "admin"),
        ("submitted", 1, "dispatcher"),
        ("running", 1, "dispatcher"),
        ("queued", 2, "dispatcher"),
    ]


async def test_a_transition_of_an_old_version_is_rejected_as_a_whole(jobs):
    job = make_job()
    await jobs.add(job)
    await jobs.request_cancel(job.id, "ann")
    assert await jobs.advance(job, to("submitted"), "dispatcher") is None
    assert await jobs.update_fields(job, mlflow_run_id="x") is None
    assert (await jobs.get(job.id)).state == JobState.QUEUED
    assert [event.reason for event in await jobs.events_of(job.id)] == [
        "submitted by the user",
        "cancellation requested",
    ]


async def test_one_of_many_concurrent_transitions_wins(jobs):
    job = make_job()
    await jobs.add(job)
    results = await asyncio.gather(*[jobs.advance(job, to("submitted"), str(n)) for n in range(8)])
    assert sum(result is not None for result in results) == 1


async def test_an_illegal_transition_is_an_internal_error(jobs):
    job = make_job()
    await jobs.add(job)
    with pytest.raises(AssertionError, match="queued -> succeeded"):
        await jobs.advance(job, to("succeeded"), "dispatcher")


async def test_a_cancellation_is_requested_once(jobs):
    job = make_job()
    await jobs.add(job)
    first = await jobs.request_cancel(job.id, "ann")
    assert first.cancel_requested
    assert await jobs.request_cancel(job.id, "ann") == first
    cancelled = await jobs.advance(first, to("cancelled"), "dispatcher")
    assert await jobs.request_cancel(job.id, "ann") == cancelled
    with pytest.raises(NotFound):
        await jobs.request_cancel("job-0", "ann")


async def test_an_ended_job_cannot_be_cancelled(jobs):
    job = make_job(state=JobState.SUBMITTED)
    await jobs.add(job)
    await jobs.advance(job, to("succeeded"), "dispatcher")
    with pytest.raises(Conflict, match="already succeeded"):
        await jobs.request_cancel(job.id, "ann")


async def test_open_jobs_include_those_not_finalized_in_mlflow(jobs):
    done, ended = [make_job(state=JobState.FAILED, mlflow_closed=closed) for closed in (True, False)]
    long_ago = datetime.now(UTC) - timedelta(seconds=4)
    waiting, limited = (
        make_job(queue_timeout_seconds=60.0),
        make_job(queue_timeout_seconds=3.0, queued_at=long_ago),
    )
    again = make_job(queue_timeout_seconds=3.0, queued_at=long_ago, attempt=2)
    running = make_job(state=JobState.RUNNING)
    for job in (done, ended, waiting, limited, again, running):
        await jobs.add(job)
    assert await jobs.open_jobs(range(SHARDS)) == [ended, limited, running]
    assert await jobs.open_jobs([shard_of(running.id)]) == [
        job for job in (ended, limited, running) if shard_of(job.id) == shard_of(running.id)
    ]


async def test_the_queue_has_queued_and_active_jobs(jobs):
    waiting, cancelled, active = (
        make_job(priority=3),
        make_job(),
        make_job(state=JobState.SUBMITTED, owner="bob"),
    )
    for job in (waiting, cancelled, active, make_job(state=JobState.FAILED)):
        await jobs.add(job)
    await jobs.request_cancel(cancelled.id, "ann")
    key = f"{waiting.id}:1"
    queue = await jobs.queue()
    assert (queue.waiting, queue.active) == ({key: waiting.schedulable()}, [active.schedulable()])
    assert queue.reasons == {waiting.id: "submitted by the user"}
    later = make_job()
    await jobs.add(later)
    known = {key: replace(waiting.schedulable(), priority=7)}  # known jobs are not read again
    again = await jobs.queue(known)
    assert again.waiting == known | {f"{later.id}:1": later.schedulable()}
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


async def test_waiting_jobs_are_ordered_by_starvation_priority_and_age(jobs):
    now = datetime.now(UTC)
    ages = {"starving": (48, -5), "old": (2, 0), "new": (1, 0), "urgent": (0, 5), "cancelled": (3, 9)}
    stored = {
        name: make_job(name=name, queued_at=now - timedelta(hours=hours), priority=priority)
        for name, (hours, priority) in ages.items()
    }
    for job in stored.values():
        await jobs.add(job)
    await jobs.request_cancel(stored["cancelled"].id, "admin")
    since = now - timedelta(hours=6)
    found, has_more = await jobs.first_waiting(4, None, since)
    assert ([job.name for job in found], has_more) == (["starving", "urgent", "old", "new"], False)
    found, has_more = await jobs.first_waiting(2, "admin", since)
    assert ([job.name for job in found], has_more) == (["starving", "urgent"], True)
    assert await jobs.first_waiting(2, "bob", since) == ([], False)
