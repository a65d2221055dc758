import pytest

from service.domain.errors import NotFound
from tests.service.examples import make_job


async def test_jobs_round_trip_through_the_database(jobs):
    job = make_job(variant={"norm": "sync", "model.hidden": [3]})
    await jobs.add(job)
    assert await jobs.get(job.id) == job
    with pytest.raises(NotFound, match="job-0"):
        await jobs.get("job-0")
