"""Both clients against a real API behind a network that drops, loses, refuses and cuts."""

import asyncio
import socket
import threading
import time
from uuid import uuid4

import pytest

from service.api.schemas import EventView
from service.client import AsyncClient, Client
from service.client.retry import ApiError, RetryPolicy
from service.client.sse import Ended, LogLine
from service.domain.jobs import JobState
from service.domain.submission import SubmitOptions
from tests.service.client.bad_network import DROP, LOSE, Answer, Cut
from tests.service.running_api import SPEC, TOKEN
from trainer.jobspec import JobSpec, Progress

QUICK = RetryPolicy(tries=4, total_seconds=10, first_pause_seconds=0.02)


class Waiting:
    """Calls by the client that waits."""

    def call(self, url, make, **options):
        with Client(url, TOKEN, **{"patience": QUICK} | options) as client:
            return make(client)

    def collect(self, url, make, **options):
        return self.call(url, lambda client: list(make(client)), **options)


class Asynchronous:
    """The same calls by the one for asyncio."""

    def call(self, url, make, **options):
        async def run():
            async with AsyncClient(url, TOKEN, **{"patience": QUICK} | options) as client:
                return await make(client)

        return asyncio.run(run())

    def collect(self, url, make, **options):
        async def gather(client):
            return [each async for each in make(client)]

        return self.call(url, gather, **options)


@pytest.fixture(params=[Waiting, Asynchronous])
def by(request):
    return request.param()


@pytest.mark.parametrize("fault", [DROP, LOSE, Answer(503, {"Retry-After": "0"}), Answer(500), Answer(502), Cut(40)])
def test_a_submission_is_stored_once_whatever_the_network_does(api, network, by, fault):
    network.faults.extend([fault, fault])
    tag = uuid4().hex
    job = by.call(network.url, lambda client: client.submit_job("once", SPEC, SubmitOptions(priority=3, tags=[tag])))
    assert (job.name, job.priority, job.tags) == ("once", 3, [tag])
    with api.client() as client:
        assert [each.id for each in client.jobs(tag=tag)] == [job.id]
    assert len(network.seen) == 3
    assert len(set(network.sent_keys())) == 1


def test_every_post_has_a_key_of_its_own_unless_one_is_given(api, network, by):
    mine = uuid4().hex
    first, again = (by.call(network.url, lambda client: client.submit_job("x", SPEC, key=mine)) for _ in range(2))
    assert first.id == again.id
    new = [by.call(network.url, lambda client: client.clone(first.id)) for _ in range(2)]
    assert len({first.id, *(job.id for job in new)}) == 3
    assert network.sent_keys()[:2] == [mine, mine]
    assert None not in network.sent_keys()
    assert len(set(network.sent_keys())) == 3
    with pytest.raises(ApiError, match="must be a new key for each request"):
        by.call(network.url, lambda client: client.submit_job("y", SPEC, key=mine))


def test_a_lost_token_is_named_so_that_it_can_be_revoked(api, network, by):
    network.faults.append(LOSE)
    with pytest.raises(ApiError, match="was made by this request before") as refused:
        by.call(network.url, lambda client: client.create_token("ann", ["read"]))
    with api.client() as client:
        lost = next(client.tokens())
        assert lost.id in str(refused.value)
    assert len(network.seen) == 2


def test_it_waits_as_long_as_the_service_asks_for(network, by):
    network.faults.append(Answer(429, {"Retry-After": "1"}))
    told = []
    began = time.monotonic()
    assert by.call(network.url, lambda client: client.me(), on_retry=told.append).owner == "admin"
    assert 1 <= time.monotonic() - began < 5
    assert "answered 429" in told[0]
    assert "trying again in 1.0 s" in told[0]


def test_a_request_in_flight_is_waited_for_and_other_conflicts_are_not(api, network, by):
    network.faults.append(Answer(409, {"Retry-After": "0"}))
    job = by.call(network.url, lambda client: client.submit_job("x", SPEC))
    assert len(network.seen) == 2
    with pytest.raises(ApiError, match="only jobs that have ended"):
        by.call(network.url, lambda client: client.resume(job.id))
    assert len(network.seen) == 3


@pytest.mark.parametrize("status", [400, 404, 501])
def test_what_would_be_refused_again_is_not_sent_again(network, by, status):
    network.faults.extend([Answer(status)])
    with pytest.raises(ApiError, match=f"answered {status}: trouble") as refused:
        by.call(network.url, lambda client: client.me())
    assert not refused.value.is_transient
    assert len(network.seen) == 1


def test_tries_end_by_their_number_and_by_their_time(network, by):
    network.faults.extend([DROP] * 4)
    with pytest.raises(ApiError, match="does not answer") as failed:
        by.call(network.url, lambda client: client.me())
    assert failed.value.is_transient
    assert len(network.seen) == 4
    network.faults.append(Answer(503, {"Retry-After": "3600"}))
    began = time.monotonic()
    with pytest.raises(ApiError, match="answered 503"):
        by.call(network.url, lambda client: client.me())
    assert time.monotonic() - began < 5


def test_a_server_that_says_nothing_is_left_after_the_time_limit(by):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ApiError, match="does not answer: "):
            by.call(
                url,
                lambda client: client.me(),
                timeout_seconds=0.2,
                patience=RetryPolicy(tries=2, first_pause_seconds=0.02),
            )
        assert 0.4 <= time.monotonic() - began < 5


def test_another_service_is_told_from_ours(network, by):
    network.faults.append(Answer(200, {}, b"<html>welcome</html>"))
    with pytest.raises(ApiError, match="did not answer as a syncbn service does"):
        by.call(network.url, lambda client: client.me())
    network.faults.append(Answer(200, {}, b"data: 1\n\n"))
    with pytest.raises(ApiError, match="text/event-stream"):
        by.collect(network.url, lambda client: client.follow_events("job-1"))


def test_a_log_is_complete_over_a_bad_network(api, network, by):
    """Lines with every end of line that Python knows but server-sent events do not; drops, refusals, and cuts within lines."""
    job_id = api.submit()
    texts = [f"line {number} \x0b \x85 \u2028 …" for number in range(200)]
    api.move(job_id, "submitted")
    api.write(job_id, "".join(f"{text}\n" for text in texts))
    api.move(job_id, "failed")
    network.faults.extend([Cut(1000), Answer(503), Cut(3333), DROP, DROP, Cut(5000), LOSE, Cut(10)])
    seen = by.collect(network.url, lambda client: client.follow_logs(job_id))
    assert [event.text for event in seen[:-1]] == texts
    assert seen[-1] == Ended(state="failed")
    last_ids = [headers["Last-Event-ID"] for _, headers in network.seen]
    assert len(last_ids) == 9
    assert last_ids[0] is None
    assert last_ids[-1].startswith("1:")


def test_a_log_is_followed_over_a_restart_of_the_service(api, by):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "before\n")

    def go_on():
        time.sleep(0.5)
        api.stop()
        time.sleep(0.5)
        api.start()
        api.write(job_id, "ERROR after\n")
        api.move(job_id, "queued", "submitted")
        api.write(job_id, "again\n")
        api.move(job_id, "cancelled")

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        seen = by.collect(api.url, lambda client: client.follow_logs(job_id), patience=RetryPolicy())
    finally:
        thread.join()
    assert seen == [
        LogLine(rank=None, level="info", text="before"),
        LogLine(rank=None, level="error", text="ERROR after"),
        LogLine(rank=None, level="info", text="again"),
        Ended(state="cancelled"),
    ]
    assert by.collect(api.url, lambda client: client.follow_logs(job_id, level="error"))[:-1] == seen[1:2]
    assert by.collect(api.url, lambda client: client.follow_logs(job_id, attempt=2))[:-1] == seen[2:3]


def test_a_stream_ends_after_tries_that_brought_nothing(api, network, by):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "one\ntwo\n")
    one = len('event: line\ndata: {"rank":null,"level":"info","text":"one"}\nid: 1:4\n\n')
    network.faults.extend([DROP, DROP, DROP, Cut(one), Cut(10), Cut(10), Cut(10), Cut(10)])
    seen = []

    def note(client):
        return (seen.append(event) or event for event in client.follow_logs(job_id))

    async def note_each(client):
        async for event in client.follow_logs(job_id):
            seen.append(event)
            yield event

    with pytest.raises(ApiError, match="ended before the job did") as failed:
        by.collect(network.url, note if isinstance(by, Waiting) else note_each)
    assert failed.value.is_transient
    assert [event.text for event in seen] == ["one"]
    assert len(network.seen) == 7  # the tries before the line that came do not count


def test_a_timeline_is_followed_with_progress(api, network, by):
    job_id = api.submit()
    api.move(job_id, "submitted", "running")

    def go_on():
        time.sleep(0.5)
        api.progress(job_id, 7)
        time.sleep(0.5)
        api.move(job_id, "succeeded")

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        network.faults.append(Cut(300))
        seen = by.collect(network.url, lambda client: client.follow_events(job_id))
    finally:
        thread.join()
    states = [event.state for event in seen if isinstance(event, EventView)]
    assert states == ["queued", "submitted", "running", "succeeded"]
    assert Progress(step=7, total_steps=10, samples_per_second=9, eta_seconds=1) in seen
    assert seen[-1] == Ended(state="succeeded")


def test_lists_are_read_page_by_page(api, network, by):
    tag = uuid4().hex
    with api.client() as client:
        ids = [client.submit_job("x", SPEC, SubmitOptions(tags=[tag])).id for _ in range(5)]
    found = by.collect(network.url, lambda client: client.jobs(tag=tag, page_size=2))
    assert [job.id for job in found] == ids[::-1]
    assert len(network.seen) == 3
    assert by.collect(network.url, lambda client: client.jobs(tag=tag, state=JobState.FAILED)) == []


def test_a_job_is_cancelled_only_as_it_was_seen(api, by):
    job_id = api.submit()
    job, etag = by.call(api.url, lambda client: client.job_with_etag(job_id))
    assert job.id == job_id
    api.move(job_id, "submitted")
    with pytest.raises(ApiError, match="has changed since") as refused:
        by.call(api.url, lambda client: client.cancel(job_id, if_match=etag))
    assert refused.value.problem.status == 412


def test_a_spec_may_be_a_model_and_only_what_was_set_is_sent(api, by):
    job = by.call(api.url, lambda client: client.submit_job("typed", JobSpec(steps=7, num_workers=1)))
    assert job.spec == JobSpec(steps=7, num_workers=1)


def test_an_id_stays_within_its_part_of_the_path(network, by):
    with pytest.raises(ApiError):
        by.call(network.url, lambda client: client.job("../tokens?x=#"))
    assert network.seen[0][0] == "GET /v1/jobs/..%2Ftokens%3Fx%3D%23"


@pytest.mark.parametrize(
    ("url", "token", "told"),
    [
        ("127.0.0.1:8000", "t", "url: must be an address"),
        ("ftp://host", "t", "url: must be an address"),
        ("http://", "t", "url: must be an address"),
        ("http://host:port", "t", "url: must be an address"),
        ("http://host", "", "token: must be one or more visible ASCII"),
        ("http://host", "a\nb", "token: must be one or more visible ASCII"),
        ("http://host", "ä", "token: must be one or more visible ASCII"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_or_a_token_that_can_be_none_is_refused_at_once(kind, url, token, told):
    with pytest.raises(ValueError, match=told):
        kind(url, token)
