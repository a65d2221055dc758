"""Messages to a real receiver, from a real database; and metrics that meet thresholds."""

import asyncio
import json
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
from service.domain.access import Caller, Scope
from service.domain.errors import Conflict, InvalidField, NotFound
from service.domain.jobs import JobState, Transition, new_id
from service.domain.lifecycle import RayStatus
from service.domain.webhooks import PAUSES_SECONDS, Threshold, Webhook, new_webhook_secret
from service.engine.webhook_sender import WebhookSender
from service.store.tables import deliveries
from service.store.webhooks import MOST_OF_AN_OWNER, WebhookStore
from tests.service.receiver import receiving
from trainer.jobspec import OUTBOX_FILE, OUTCOME_FILE, Outcome

ADMIN = Caller("admin", (Scope.ADMIN,), "token-1")
LOCAL = [ip_network("127.0.0.0/8")]


@pytest.fixture
def receiver():
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def webhooks(database):
    return WebhookStore(database)


@pytest.fixture
async def sender(webhooks):
    outgoing = WebhookHttp(LOCAL, 2)
    counter = Counter("messages", "", ["result"], registry=CollectorRegistry())
    yield WebhookSender(webhooks, outgoing, counter, poll_seconds=0.02, send_seconds=2)
    await outgoing.close()


async def make(webhooks, url, **changes):
    values = {"owner": "admin", "states": (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)}
    hook = Webhook(
        id=new_id("webhook"), url=url, secret=new_webhook_secret(), created_at=datetime.now(UTC), **(values | changes)
    )
    await webhooks.add(hook, ADMIN)
    return hook


async def cancel(house, **changes):
    job = await house.add(**changes)
    return await house.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")


async def let_time_pass(database, delivery, seconds):
    async with database.write() as connection:
        due_at = delivery.due_at - timedelta(seconds=seconds)
        await connection.execute(update(deliveries).where(deliveries.c.id == delivery.id).values(due_at=due_at))


async def round_of(sender):
    """Send what is due, and wait until that is done."""
    count = await sender.take()
    await asyncio.gather(*sender._on_their_way.values())
    return count


async def only_message(webhooks, hook):
    (found,), _ = await webhooks.deliveries_of(hook.id, 10, None)
    return found


async def test_an_end_is_told_once_signed_and_by_whose_webhook_it_is(house, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await make(webhooks, receiver.url, owner="bob")
    await make(webhooks, receiver.url, states=(JobState.FAILED,))
    await make(webhooks, receiver.url, tag="nightly")
    job = await cancel(house)
    assert await round_of(sender) == 1
    assert await round_of(sender) == 0
    ((headers, body),) = receiver.messages
    assert Checker(hook.secret).verify(body, headers)["data"]["job_id"] == job.id
    message = await only_message(webhooks, hook)
    assert (headers["webhook-id"], message.is_delivered, message.answer) == (message.id, True, "answered 204")


async def test_what_is_not_taken_is_sent_again_under_the_same_id_and_at_last_given_up(
    house, database, webhooks, sender, receiver
):
    hook = await make(webhooks, receiver.url)
    await cancel(house)
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
    assert (message.tries, message.is_delivered, message.answer) == (9, False, "answered 503")
    assert message.ended_at is not None
    assert len({headers["webhook-id"] for headers, _ in receiver.messages}) == 1
    assert len(receiver.messages) == 9  # redirections are not followed


async def test_who_wants_no_more_gets_no_more(house, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(house)
    receiver.statuses = [410]
    await round_of(sender)
    assert (await only_message(webhooks, hook)).ended_at is not None


async def test_a_sender_that_dies_leaves_its_messages_to_others(house, database, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(house)
    assert len(await webhooks.claim_due(10, 30)) == 1  # and is never heard of again
    assert await round_of(sender) == 0
    await let_time_pass(database, await only_message(webhooks, hook), 30)
    assert await round_of(sender) == 1
    assert len(receiver.messages) == 1


async def test_nobody_is_there(house, webhooks, sender):
    hook = await make(webhooks, "http://127.0.0.1:1/")
    await cancel(house)
    await round_of(sender)
    message = await only_message(webhooks, hook)
    assert (message.tries, message.answer) == (1, "could not be reached: ConnectError")


async def test_an_address_is_looked_at_again_when_it_is_connected_to(receiver):
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
async def test_urls_that_are_refused(url, words):
    with pytest.raises(InvalidField, match=words):
        await WebhookHttp([], 2).check(url)


async def test_urls_that_are_taken():
    await WebhookHttp([], 2).check("https://93.184.215.14/hook")
    await WebhookHttp(LOCAL, 2).check("http://127.0.0.1:8080/hook")


async def test_deleting_one_stops_its_messages(house, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(house)
    await webhooks.delete(hook, ADMIN)
    assert await round_of(sender) == 0
    with pytest.raises(NotFound):
        await webhooks.get(hook.id)


async def test_an_owner_has_so_many_at_most(webhooks):
    for _ in range(MOST_OF_AN_OWNER):
        await make(webhooks, "https://a")
    with pytest.raises(Conflict):
        await make(webhooks, "https://a")
    await make(webhooks, "https://a", owner="bob")


async def test_a_threshold_is_told_of_once_for_each_job_also_over_a_restart(house, webhooks):
    thresholds = (
        Threshold(metric="accuracy", relation="at_least", bound=0.9),
        Threshold(metric="test_loss", relation="at_most", bound=0.1),
    )
    hook = await make(webhooks, "https://a", states=(), thresholds=thresholds)
    job = await house.add()
    await house.round()
    house.ray.set(job.submission_id, RayStatus.RUNNING)
    outbox = house.files.job_folder(job.id) / OUTBOX_FILE
    outbox.parent.mkdir(parents=True, exist_ok=True)

    def measure(step, accuracy, end="\n"):
        line = json.dumps({"kind": "evaluation", "step": step, "metrics": {"accuracy": accuracy, "test_loss": 1.0}})
        with outbox.open("a") as file:
            file.write(line + end)

    async def told():
        found, _ = await webhooks.deliveries_of(hook.id, 10, None)
        return [(delivery.about, json.loads(delivery.body)["data"]["threshold"]["step"]) for delivery in found]

    measure(0, 0.1)
    measure(10, 0.95, end="")  # a line that is still being written
    await house.round()
    assert await told() == []
    with outbox.open("a") as file:
        file.write("\nhalf a li\n")
    measure(20, 0.97)
    await house.round()
    assert await told() == [("accuracy at least 0.9", 10)]
    house.reopen()
    await house.round()
    assert await told() == [("accuracy at least 0.9", 10)]


async def test_what_a_job_measures_last_counts(house, webhooks):
    hook = await make(webhooks, "https://a", thresholds=(Threshold(metric="accuracy", relation="at_least", bound=0.9),))
    job = await house.add()
    await house.round()
    line = json.dumps({"kind": "evaluation", "step": 10, "metrics": {"accuracy": 0.99}})
    house.write(job, OUTCOME_FILE, Outcome(state="succeeded", reason="finished"))
    (house.files.job_folder(job.id) / OUTBOX_FILE).write_text(line + "\n")
    house.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    await house.round()
    assert await house.state(job) == "succeeded"
    found, _ = await webhooks.deliveries_of(hook.id, 10, None)
    assert [delivery.about for delivery in found] == ["succeeded", "accuracy at least 0.9"]


async def test_a_webhook_that_is_made_while_a_job_runs_is_told_of_what_was_before_and_places_are_forgotten(
    house, webhooks, monkeypatch
):
    threshold = Threshold(metric="accuracy", relation="at_least", bound=0.9)
    await make(webhooks, "https://a", states=(), thresholds=(threshold,))
    job = await house.add()
    await house.round()
    outbox = house.files.job_folder(job.id) / OUTBOX_FILE
    outbox.parent.mkdir(parents=True, exist_ok=True)
    measured = {"step": 10, "metrics": {"accuracy": 0.99}}
    others = [
        {"metrics": {"accuracy": 1.0}},
        {"step": 5, "metrics": {"accuracy": "high"}},
        {"step": None, "metrics": {}},
    ]
    outbox.write_text("".join(json.dumps(line) + "\n" for line in [*others, measured]))
    await house.thresholds.refresh()
    await house.thresholds.look(job)
    late = await make(webhooks, "https://b", states=(), thresholds=(threshold,))
    await house.thresholds.refresh()
    await house.thresholds.look(job)
    assert json.loads((await only_message(webhooks, late)).body)["data"]["threshold"]["step"] == 10
    assert len(house.thresholds._places) == 2
    monkeypatch.setattr("service.engine.metric_alerts.FORGET_SECONDS", 0)
    await house.thresholds.refresh()
    assert house.thresholds._places == {}


async def test_a_receiver_that_does_not_answer_keeps_only_its_own_messages_waiting(house, webhooks, sender, receiver):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        dead = await make(webhooks, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        for _ in range(15):
            await cancel(house)
        await make(webhooks, receiver.url)
        await cancel(house)
        began = time.monotonic()
        task = asyncio.create_task(sender.run())
        while not receiver.messages:
            await asyncio.sleep(0.01)
        for _ in range(3):
            await cancel(house)
        while len(receiver.messages) < 4:
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 2  # after which the first message to the other one is given up
        task.cancel()
        await asyncio.wait([task])
    assert [each.tries for each in (await webhooks.deliveries_of(dead.id, 50, None))[0]] == [0] * 19


async def test_an_end_waits_for_what_is_on_its_way_and_storing_that_may_fail(
    house, database, webhooks, sender, receiver, monkeypatch, caplog
):
    hook = await make(webhooks, receiver.url)
    await cancel(house)
    storing, has_ended = asyncio.Event(), asyncio.Event()

    async def slow(delivery):
        storing.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)  # as a connection that is given back
            has_ended.set()

    async def fail(delivery):
        raise ValueError("a mistake")

    with monkeypatch.context() as patched:
        patched.setattr(webhooks, "note_try", slow)
        task = asyncio.create_task(sender.run())
        await asyncio.wait_for(storing.wait(), 5)
        task.cancel()
        await asyncio.wait([task])
    assert has_ended.is_set()
    await let_time_pass(database, await only_message(webhooks, hook), 30)
    with monkeypatch.context() as patched:
        patched.setattr(webhooks, "note_try", fail)
        assert await round_of(sender) == 1
    assert "could not be stored: a mistake" in caplog.text
    assert (await only_message(webhooks, hook)).ended_at is None


async def test_a_sender_that_comes_back_late_changes_nothing(house, database, webhooks, sender, receiver):
    hook = await make(webhooks, receiver.url)
    await cancel(house)
    ((_, late),) = await webhooks.claim_due(10, 30)
    await let_time_pass(database, await only_message(webhooks, hook), 30)
    assert await round_of(sender) == 1
    await webhooks.note_try(replace(late, tries=1, answer="answered 500"))
    message = await only_message(webhooks, hook)
    assert (message.is_delivered, message.tries, message.answer) == (True, 1, "answered 204")


async def test_one_that_is_deleted_while_a_job_ends_is_told_of_nothing(house, database, webhooks):
    hook = await make(webhooks, "https://a")
    job = await house.add()
    async with database.transaction():
        await house.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
        deleting = asyncio.create_task(webhooks.delete(hook, ADMIN))
        await asyncio.sleep(0.2)
    await deleting
    assert (await webhooks.deliveries_of(hook.id, 10, None))[0] == []
    with pytest.raises(NotFound):
        await webhooks.delete(hook, ADMIN)


async def test_one_that_is_being_deleted_is_told_of_no_end(house, database, webhooks):
    hook = await make(webhooks, "https://a")
    job = await house.add()
    met = Threshold(metric="accuracy", relation="at_least", bound=0.9)
    async with database.transaction():
        await webhooks.delete(hook, ADMIN)
        ending = asyncio.create_task(
            house.jobs.advance(job, Transition(state=JobState.CANCELLED, reason="test"), "ann")
        )
        telling = asyncio.create_task(webhooks.announce(hook, job, met, 1, 0.95))
        await asyncio.sleep(0.2)
    await asyncio.gather(ending, telling)
    assert await house.state(job) == "cancelled"
    assert (await webhooks.deliveries_of(hook.id, 10, None))[0] == []


async def test_an_owner_has_no_more_by_making_them_at_one_time(database, webhooks):
    for _ in range(MOST_OF_AN_OWNER - 1):
        await make(webhooks, "https://a")
    async with database.transaction():
        await make(webhooks, "https://a")
        other = asyncio.create_task(make(webhooks, "https://a"))
        await asyncio.sleep(0.2)
    with pytest.raises(Conflict):
        await other
