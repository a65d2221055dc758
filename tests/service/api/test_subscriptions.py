import asyncio

import pytest

from service.api.subscriptions import JobFeed
from service.domain.jobs import JobState
from service.store.jobs import JobSnapshot


class Jobs:
    def __init__(self):
        self.found = {}

    async def snapshots(self, job_ids):
        return {job_id: snapshot for job_id, snapshot in self.found.items() if job_id in job_ids}


class Tokens:
    def __init__(self):
        self.valid = {"token-1"}

    async def valid_among(self, asked):
        return asked & self.valid


QUEUED = JobSnapshot(1, JobState.QUEUED, 1, None)
RUNNING = JobSnapshot(2, JobState.RUNNING, 1, None)


@pytest.fixture
def feed():
    return JobFeed(Jobs(), Tokens(), poll_seconds=0.01, max_streams=2)


async def test_a_subscriber_waits_for_a_change(feed):
    assert feed.open_stream("token-1")
    with feed.subscribe("job-1"):
        waiting = asyncio.create_task(feed.wait_for_change("job-1", QUEUED, "token-1", 5))
        feed._jobs.found = {"job-1": RUNNING, "job-2": RUNNING}
        await feed.poll()
        assert await waiting == RUNNING
        assert await feed.wait_for_change("job-1", RUNNING, "token-1", 0.01) == RUNNING
    with feed.subscribe("job-1"):  # no state of the earlier subscription remains
        assert await feed.wait_for_change("job-1", None, "token-1", 0.01) is None


async def test_revoking_a_token_ends_its_streams(feed):
    feed.open_stream("token-1")
    feed._tokens.valid = set()
    with feed.subscribe("job-1"):
        waiting = asyncio.create_task(feed.wait_for_change("job-1", None, "token-1", 5))
        await feed.poll()
        assert await waiting is None
    assert feed.is_over("token-1")
    assert not feed.is_over("token-2")
    await feed.close()
    assert feed.is_over("token-2")


def test_a_token_has_a_limited_number_of_streams(feed):
    assert [feed.open_stream("token-1") for _ in range(3)] == [True, True, False]
    assert feed.open_stream("token-2")
    feed.close_stream("token-1")
    assert feed.open_stream("token-1")
