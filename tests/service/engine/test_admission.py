from service.domain.leases import SCHEDULER
from service.domain.lifecycle import RayStatus
from service.domain.resources import Resources
from service.store.leases import LeaseStore
from trainer.jobspec import OUTCOME_FILE, STOP_FILE, JobSpec, Outcome


async def test_queue_reasons_changed_by_another_replica_are_written_again(replica):
    job = await replica.add(spec=JobSpec(steps=1, num_workers=30))
    await replica.tick()
    reason = (await replica.jobs.get(job.id)).reason
    leases = LeaseStore(replica.database)
    await leases.release(replica.name)
    other = (await leases.keep("other", 1_000))[SCHEDULER]
    await replica.jobs.set_queue_reasons({job.id: "waits for something else"}, other)
    await replica.tick()
    assert (await replica.jobs.get(job.id)).reason == "waits for something else"
    await leases.release("other")
    await replica.lease_holder.renew()
    await replica.tick()
    assert (await replica.jobs.get(job.id)).reason == reason


async def test_queue_reasons_overwritten_elsewhere_are_restored(replica, monkeypatch):
    job = await replica.add(spec=JobSpec(steps=1, num_workers=30))
    await replica.tick()
    reason = (await replica.jobs.get(job.id)).reason
    await replica.jobs.set_queue_reasons(
        {job.id: "waits for something else"}, replica.lease_holder.scheduler()
    )
    await replica.tick()
    assert (await replica.jobs.get(job.id)).reason == "waits for something else"
    monkeypatch.setattr("service.engine.admission.FORGET_SECONDS", 0.0)
    await replica.tick()
    assert (await replica.jobs.get(job.id)).reason == reason


async def test_jobs_that_wait_for_resources_have_a_queue_reason(replica):
    first, second, large = [await replica.add(spec=JobSpec(steps=1, num_workers=n)) for n in (2, 1, 30)]
    await replica.tick()
    assert [await replica.state(job) for job in (first, second, large)] == ["submitted", "queued", "queued"]
    assert (await replica.jobs.get(second.id)).reason == "waits for 1 CPUs"
    assert "the whole cluster has 2 CPUs" in (await replica.jobs.get(large.id)).reason
    replica.ray.total = Resources(cpus=33, gpus=0)
    await replica.tick()
    assert [await replica.state(job) for job in (second, large)] == ["submitted", "submitted"]


async def test_a_job_without_a_first_step_is_not_counted_twice(replica):
    """Its worker has its CPU, which Ray no longer reports as free."""
    first = await replica.add(spec=JobSpec(steps=1, num_workers=1))
    await replica.tick()
    second = await replica.add(spec=JobSpec(steps=1, num_workers=2))
    replica.ray.set(first.submission_id, RayStatus.RUNNING)
    replica.ray.free = Resources(cpus=1)
    third = await replica.add(spec=JobSpec(steps=1, num_workers=1))
    await replica.tick()
    assert (await replica.jobs.get(first.id)).progress is None
    assert [await replica.state(job) for job in (first, second, third)] == ["running", "queued", "submitted"]


async def test_a_job_of_a_higher_priority_preempts_a_running_one(replica):
    low = await replica.add_running(spec=JobSpec(steps=1, num_workers=2), preemptible=True, priority=-1)
    urgent = await replica.add(spec=JobSpec(steps=1, num_workers=2))
    small = await replica.add(spec=JobSpec(steps=1, num_workers=1), priority=-1)
    for _ in range(3):
        await replica.tick()
    seen = await replica.jobs.get(low.id)
    assert (seen.state, seen.preempted_by) == ("running", urgent.id)
    assert (replica.files.attempt_folder(low) / STOP_FILE).exists()
    assert (await replica.jobs.get(small.id)).reason.startswith(f"waits behind {urgent.id}")
    saved = Outcome(state="failed", reason="stopped on request; saved after 3 steps", cause="preempted")
    replica.write(low, OUTCOME_FILE, saved)
    replica.ray.set(low.submission_id, RayStatus.FAILED)
    await replica.tick()
    seen = await replica.jobs.get(low.id)
    assert (seen.state, seen.attempt, seen.failure_kind, seen.failures.counts) == (
        "queued",
        2,
        "preempted",
        {},
    )
    await replica.tick()
    assert [await replica.state(job) for job in (low, urgent, small)] == ["queued", "submitted", "queued"]
    replica.ray.set(urgent.submission_id, RayStatus.RUNNING)
    await replica.tick()
    replica.write(urgent, OUTCOME_FILE, Outcome(state="succeeded", reason="done"))
    replica.ray.set(urgent.submission_id, RayStatus.SUCCEEDED)
    await replica.tick()
    await replica.tick()
    states = {job.id: await replica.state(job) for job in (low, urgent, small)}
    # The smaller one has waited for longer since.
    assert states == {low.id: "queued", urgent.id: "succeeded", small.id: "submitted"}
    await replica.jobs.request_cancel(small.id, "ann")
    for _ in range(3):
        await replica.tick()
    seen = await replica.jobs.get(low.id)
    assert (seen.state, seen.attempt, seen.preempted_by) == ("submitted", 2, None)
    events = [(event.reason, event.actor) for event in await replica.jobs.events_of(low.id)]
    assert (f"preemption by {urgent.id} requested", "dispatcher") in events
