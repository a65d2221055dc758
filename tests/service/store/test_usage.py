import pytest

from service.store.tables import events
from service.store.tables import jobs as table
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
