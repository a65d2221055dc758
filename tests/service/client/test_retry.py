import socket
import time
from uuid import uuid4

import pytest

from service.client.retry import ApiError, RetryPolicy
from service.domain.submission import SubmitOptions
from tests.service.client.bad_network import DROP, LOSE, Answer, Cut
from tests.service.running_api import SPEC


@pytest.mark.parametrize(
    "fault", [DROP, LOSE, Answer(503, {"Retry-After": "0"}), Answer(500), Answer(502), Cut(40)]
)
def test_a_submission_is_stored_once_despite_network_faults(api, network, by, fault):
    network.faults.extend([fault, fault])
    tag = uuid4().hex
    job = by.call(
        network.url, lambda client: client.submit_job("once", SPEC, SubmitOptions(priority=3, tags=[tag]))
    )
    assert (job.name, job.priority, job.tags) == ("once", 3, [tag])
    with api.client() as client:
        assert [each.id for each in client.jobs(tag=tag)] == [job.id]
    assert len(network.seen) == 3
    assert len(set(network.sent_keys())) == 1


def test_the_client_honours_retry_after(network, by):
    network.faults.append(Answer(429, {"Retry-After": "1"}))
    messages = []
    began = time.monotonic()
    assert by.call(network.url, lambda client: client.me(), on_retry=messages.append).owner == "admin"
    assert 1 <= time.monotonic() - began < 5
    assert "answered 429" in messages[0]
    assert "trying again in 1.0 s" in messages[0]


def test_a_request_in_flight_is_retried_and_other_conflicts_are_not(api, network, by):
    network.faults.append(Answer(409, {"Retry-After": "0"}))
    job = by.call(network.url, lambda client: client.submit_job("x", SPEC))
    assert len(network.seen) == 2
    with pytest.raises(ApiError, match="only jobs that are paused or have ended"):
        by.call(network.url, lambda client: client.resume(job.id))
    assert len(network.seen) == 3


@pytest.mark.parametrize("status", [400, 404, 501])
def test_permanent_rejections_are_not_retried(network, by, status):
    network.faults.extend([Answer(status)])
    with pytest.raises(ApiError, match=f"answered {status}: error") as refused:
        by.call(network.url, lambda client: client.me())
    assert not refused.value.is_transient
    assert len(network.seen) == 1


def test_attempts_are_limited_in_number_and_time(network, by):
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


def test_a_silent_server_times_out(by):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ApiError, match="does not answer: "):
            by.call(
                url,
                lambda client: client.me(),
                timeout_seconds=0.2,
                retry_policy=RetryPolicy(max_attempts=2, first_pause_seconds=0.02),
            )
        assert 0.4 <= time.monotonic() - began < 5
