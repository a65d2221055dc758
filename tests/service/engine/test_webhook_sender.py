"""Messages from a real database to a real receiver; metrics that cross thresholds."""

import asyncio
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import pytest
from prometheus_client import CollectorRegistry, Counter
from sqlalchemy import update
from standardwebhooks import Webhook as Checker

from service.adapters.webhook_http import Forbidden, WebhookHttp
from service.domain.errors import NotFound
from service.domain.jobs import JobState, Transition
from service.domain.webhooks import PAUSES_SECONDS
from service.engine.webhook_sender import WebhookSender
from service.store.tables import deliveries
from tests.service.engine.webhook_fixtures import ADMIN, make, only_message
from tests.service.receiver import receiving
from trainer.jobspec import InvalidField

LOCAL = [ip_network("127.0.0.0/8")]


@pytest.fixture
def receiver():
    with receiving() as receiver:
        yield receiver


@pytest.fixture
async def sender(webhooks):
    outgoing = WebhookHttp(LOCAL, 2)
    counter = Counter("messages", "", ["result"], registry=CollectorRegistry())
    yield WebhookSender(webhooks, outgoing, counter, poll_seconds=0.02, send_seconds=2)
    await outgoing.close()


async def cancel(replica, **changes):
    job = await replica.add(**changes)
    return await replica.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")


async def let_time_pass(database, delivery, seconds):
    async with database.write() as connection:
        due_at = delivery.due_at - timedelta(seconds=seconds)
        await connection.execute(
            update(deliveries).where(deliveries.c.id == delivery.id).values(due_at=due_at)
        )


async def round_of(sender):
    """Send due messages, and wait until they are sent."""
    count = await sender.take()
    await asyncio.gather(*sender._on_their_way.values())
    return count


async def test_the_end_of_a_job_is_sent_once_signed_to_webhooks_of_its_owner(
    replica, webhooks, sender, receiver
):
    hook = await make(webhooks, receiver.url)
    await make(webhooks, receiver.url, owner="bob")
    await make(webhooks, receiver.url, states=(JobState.FAILED,))
    await make(webhooks, receiver.url, tag="nightly")
    job = await cancel(replica)
    assert await round_of(sender) == 1
    assert await round_of(sender) == 0
    ((headers, body),) = receiver.messages
    assert Checker(hook.secret).verify(body, headers)["data"]["job_id"] == job.id
    message = await only_message(webhooks, hook)
    assert (headers["webhook-id"], message.is_delivered, message.answer) == (message.id, True, "answered 204")


async def test_rejected_messages_are_retried_with_the_same_id_up_to_the_limit(
    replica, database, webhooks, sender, receiver
):
    hook = await make(webhooks, receiver.url)
    await cancel(replica)
    receiver.statuses = [500, 302, *[503] * len(PAUSES_SECONDS)]
    for pause in PAUSES_SECONDS:
        assert await round_of(sender) == 1
        assert await round_of(sender) == 0
        message = await only_message(webhooks, hook)
        assert message.ended_at is None
        assert timedelta(seconds=pause - 5) < message.due_at - datetime.now(UTC) <= timedelta(seconds=pause)
        await let_time_pass(database, message, pause)
    assert await round_of(sender) == 1
    message = await only_message(webhooks, hook)
    assert (message.attempts, message.is_delivered, message.answer) == (9, False, "answered 503")
    assert message.ended_at is not None
    assert len({headers["webhook-id"] for headers, _ in receiver.messages}) == 1
    assert len(receiver.messages) == 9  # redirects are not followed


async def test_a_gone_receiver_gets_no_more_messages(replica, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(replica)
    receiver.statuses = [410]
    await round_of(sender)
    assert (await only_message(webhooks, hook)).ended_at is not None


async def test_messages_of_a_dead_sender_are_sent_by_others(replica, database, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(replica)
    assert len(await webhooks.claim_due(10, 30)) == 1  # and never returns
    assert await round_of(sender) == 0
    await let_time_pass(database, await only_message(webhooks, hook), 30)
    assert await round_of(sender) == 1
    assert len(receiver.messages) == 1


async def test_an_unreachable_receiver_is_recorded(replica, webhooks, sender):
    hook = await make(webhooks, "http://127.0.0.1:1/")
    await cancel(replica)
    await round_of(sender)
    message = await only_message(webhooks, hook)
    assert (message.attempts, message.answer) == (1, "could not be reached: ConnectError")


async def test_addresses_are_checked_again_at_connection(receiver):
    outgoing = WebhookHttp([], 2)
    with pytest.raises(Forbidden):
        await outgoing.post(receiver.url, "{}", {})
    await outgoing.close()
    assert receiver.messages == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://127.0.0.1/", "public address"),
        ("https://169.254.169.254/latest/meta-data", "public address"),
        ("https://[::ffff:10.0.0.1]/", "public address"),
        ("https://2130706433/", "public address"),  # 127.0.0.1 as one number
        ("https://localhost:8443/", "public address"),
        ("https://there-is-no-such-name.invalid/", "does not resolve"),
        ("https://two..dots/", "does not resolve"),
        (f"https://{'a' * 64}.example/", "does not resolve"),
        ("https://ann:secret@93.184.215.14/", "user name"),
        ("http://93.184.215.14/", "must be https"),
    ],
)
async def test_rejected_urls(url, words):
    with pytest.raises(InvalidField, match=words):
        await WebhookHttp([], 2).check(url)


async def test_accepted_urls():
    await WebhookHttp([], 2).check("https://93.184.215.14/hook")
    await WebhookHttp(LOCAL, 2).check("http://127.0.0.1:8080/hook")


async def test_deleting_a_webhook_stops_its_messages(replica, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(replica)
    await webhooks.delete(hook, ADMIN)
    assert await round_of(sender) == 0
    with pytest.raises(NotFound):
        await webhooks.get(hook.id)


async def test_a_silent_receiver_delays_only_its_own_messages(replica, webhooks, sender, receiver):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        dead = await make(webhooks, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        for _ in range(15):
            await cancel(replica)
        await make(webhooks, receiver.url)
        await cancel(replica)
        began = time.monotonic()
        task = asyncio.create_task(sender.run())
        while not receiver.messages:
            await asyncio.sleep(0.01)
        for _ in range(3):
            await cancel(replica)
        while len(receiver.messages) < 4:
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 2  # then the first message to the other receiver times out
        task.cancel()
        await asyncio.wait([task])
    assert [each.attempts for each in (await webhooks.deliveries_of(dead.id, 50, None))[0]] == [0] * 19


async def test_stopping_waits_for_messages_in_flight_even_if_storing_fails(
    replica, database, webhooks, sender, receiver, monkeypatch, caplog
):
    hook = await make(webhooks, receiver.url)
    await cancel(replica)
    storing, has_ended = asyncio.Event(), asyncio.Event()

    async def slow(delivery):
        storing.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)  # like a released connection
            has_ended.set()

    async def fail(delivery):
        raise ValueError("a mistake")

    with monkeypatch.context() as patched:
        patched.setattr(webhooks, "record_attempt", slow)
        task = asyncio.create_task(sender.run())
        await asyncio.wait_for(storing.wait(), 5)
        task.cancel()
        await asyncio.wait([task])
    assert has_ended.is_set()
    await let_time_pass(database, await only_message(webhooks, hook), 30)
    with monkeypatch.context() as patched:
        patched.setattr(webhooks, "record_attempt", fail)
        assert await round_of(sender) == 1
    assert "could not be stored: a mistake" in caplog.text
    assert (await only_message(webhooks, hook)).ended_at is None


async def test_a_late_sender_changes_nothing(replica, database, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(replica)
    ((_, late),) = await webhooks.claim_due(10, 30)
    await let_time_pass(database, await only_message(webhooks, hook), 30)
    assert await round_of(sender) == 1
    await webhooks.record_attempt(replace(late, attempts=1, answer="answered 500"))
    message = await only_message(webhooks, hook)
    assert (message.is_delivered, message.attempts, message.answer) == (True, 1, "answered 204")
