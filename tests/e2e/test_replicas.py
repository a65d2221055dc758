"""Three replicas on one PostgreSQL, of which one is frozen for longer than its lease."""

import asyncio
import os
import signal
import time

import asyncpg
import pytest

from service.domain.leases import shard_of
from service.local.host import choose_ports
from tests.e2e.service import Service
from tests.e2e.test_service import SPEC
from tests.service.databases import postgresql_server

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]
LEASE_SECONDS = 2
STEPS = 4_000


@pytest.fixture(scope="module")
def database_url():
    with postgresql_server() as url:
        yield url


@pytest.fixture
def replicas(stack, database_url, tmp_path):
    services = {}
    for name, port in zip(("one", "two", "three"), choose_ports(3), strict=True):
        environment = stack.api_environment | {
            "SYNCBN_DATABASE_URL": database_url,
            "SYNCBN_REPLICA": name,
            "SYNCBN_PORT": str(port),
            "SYNCBN_LEASE_SECONDS": str(LEASE_SECONDS),
        }
        services[name] = Service(environment, tmp_path / f"{name}.log")
    try:
        for service in services.values():
            service.start()
        yield services
    finally:
        for service in services.values():
            if service.process is not None:
                service.process.send_signal(signal.SIGCONT)
                service.stop()


def holder_of(database_url, lease):
    """Return the holder of a lease from the database, or None."""

    async def ask():
        connection = await asyncpg.connect(database_url.replace("+asyncpg", ""))
        try:
            return await connection.fetchval(
                "SELECT holder FROM leases WHERE name = $1 AND until > now()", lease
            )
        finally:
            await connection.close()

    return asyncio.run(ask())


@pytest.mark.timeout(600)
def test_a_replica_frozen_past_its_lease_changes_nothing_afterwards(replicas, database_url):
    with replicas["one"].client() as client:
        job_id = client.submit_job("through a frozen replica", SPEC | {"steps": STEPS, "eval_every": 500}).id
    lease = f"shard-{shard_of(job_id)}"
    replicas["two"].until(job_id, "running", progress=1)
    frozen = holder_of(database_url, lease)
    os.kill(replicas[frozen].process.pid, signal.SIGSTOP)
    awake = next(service for name, service in replicas.items() if name != frozen)
    deadline = time.monotonic() + 15
    while (now := holder_of(database_url, lease)) in (None, frozen):
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    # Metrics go through the replica that submitted the job, and the uploader waits 180 s for it.
    ended = awake.until(job_id, "succeeded", seconds=300)
    os.kill(replicas[frozen].process.pid, signal.SIGCONT)
    deadline = time.monotonic() + 15
    while holder_of(database_url, lease) != frozen:  # it takes leases again and reconciles jobs
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with replicas[frozen].client() as client:
        seen, events = client.job(job_id), client.events(job_id).events
        log = client.logs(job_id)
    # Each replica links to itself.
    assert seen.model_copy(update={"mlflow_url": ended.mlflow_url}) == ended
    assert (seen.attempt, seen.reason) == (1, f"finished {STEPS} steps")
    assert [event.state for event in events] == ["queued", "submitted", "running", "succeeded"]
    assert log.count(f"step {STEPS}/{STEPS}") == 1
