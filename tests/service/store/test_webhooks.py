import asyncio

import pytest

from service.domain.errors import Conflict, NotFound
from service.domain.jobs import JobState, Transition
from service.domain.webhooks import Threshold
from service.store.webhooks import MAX_WEBHOOKS_PER_OWNER
from tests.service.engine.webhook_fixtures import ADMIN, make


async def test_webhooks_per_owner_are_limited(webhooks):
    for _ in range(MAX_WEBHOOKS_PER_OWNER):
        await make(webhooks, "https://a")
    with pytest.raises(Conflict):
        await make(webhooks, "https://a")
    await make(webhooks, "https://a", owner="bob")


async def test_a_webhook_deleted_while_a_job_ends_gets_no_message(replica, database, webhooks):
    hook = await make(webhooks, "https://a")
    job = await replica.add()
    async with database.transaction():
        await replica.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
        deleting = asyncio.create_task(webhooks.delete(hook, ADMIN))
        await asyncio.sleep(0.2)
    await deleting
    assert (await webhooks.deliveries_of(hook.id, 10, None))[0] == []
    with pytest.raises(NotFound):
        await webhooks.delete(hook, ADMIN)


async def test_a_webhook_that_is_being_deleted_gets_no_message(replica, database, webhooks):
    hook = await make(webhooks, "https://a")
    job = await replica.add()
    met = Threshold(metric="accuracy", relation="at_least", bound=0.9)
    async with database.transaction():
        await webhooks.delete(hook, ADMIN)
        ending = asyncio.create_task(
            replica.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
        )
        telling = asyncio.create_task(webhooks.announce(hook, job, met, 1, 0.95))
        await asyncio.sleep(0.2)
    await asyncio.gather(ending, telling)
    assert await replica.state(job) == "cancelled"
    assert (await webhooks.deliveries_of(hook.id, 10, None))[0] == []


async def test_the_webhook_limit_holds_under_concurrent_creation(database, webhooks):
    for _ in range(MAX_WEBHOOKS_PER_OWNER - 1):
        await make(webhooks, "https://a")
    async with database.transaction():
        await make(webhooks, "https://a")
        other = asyncio.create_task(make(webhooks, "https://a"))
        await asyncio.sleep(0.2)
    with pytest.raises(Conflict):
        await other
