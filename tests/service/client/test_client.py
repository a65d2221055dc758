"""Both clients with a real API behind a network that loses, rejects and cuts requests."""

from uuid import uuid4

import pytest

from service.client import AsyncClient, Client
from service.client.retry import ApiError
from service.domain.jobs import JobState
from service.domain.submission import SubmitOptions
from tests.service.client.bad_network import LOSE, Answer
from tests.service.running_api import SPEC
from trainer.jobspec import JobSpec


def test_every_post_has_a_unique_key_unless_one_is_given(api, network, by):
    mine = uuid4().hex
    first, again = (
        by.call(network.url, lambda client: client.submit_job("x", SPEC, key=mine)) for _ in range(2)
    )
    assert first.id == again.id
    new = [by.call(network.url, lambda client: client.clone(first.id)) for _ in range(2)]
    assert len({first.id, *(job.id for job in new)}) == 3
    assert network.sent_keys()[:2] == [mine, mine]
    assert None not in network.sent_keys()
    assert len(set(network.sent_keys())) == 3
    with pytest.raises(ApiError, match="must be a new key for each request"):
        by.call(network.url, lambda client: client.submit_job("y", SPEC, key=mine))


def test_a_token_whose_response_was_lost_is_named_for_revocation(api, network, by):
    network.faults.append(LOSE)
    with pytest.raises(ApiError, match="was made by this request before") as refused:
        by.call(network.url, lambda client: client.create_token("ann", ["read"]))
    with api.client() as client:
        lost = next(client.tokens())
        assert lost.id in str(refused.value)
    assert len(network.seen) == 2


def test_a_server_that_is_not_this_service_is_recognised(network, by):
    network.faults.append(Answer(200, {}, b"<html>welcome</html>"))
    with pytest.raises(ApiError, match="did not answer as a syncbn service does"):
        by.call(network.url, lambda client: client.me())
    network.faults.append(Answer(200, {}, b"data: 1\n\n"))
    with pytest.raises(ApiError, match="text/event-stream"):
        by.collect(network.url, lambda client: client.follow_events("job-1"))


def test_lists_are_read_page_by_page(api, network, by):
    tag = uuid4().hex
    with api.client() as client:
        ids = [client.submit_job("x", SPEC, SubmitOptions(tags=[tag])).id for _ in range(5)]
    found = by.collect(network.url, lambda client: client.jobs(tag=tag, page_size=2))
    assert [job.id for job in found] == ids[::-1]
    assert len(network.seen) == 3
    assert by.collect(network.url, lambda client: client.jobs(tag=tag, state=JobState.FAILED)) == []


def test_a_cancel_is_conditional_on_the_version_seen(api, by):
    job_id = api.submit()
    job, etag = by.call(api.url, lambda client: client.job_with_etag(job_id))
    assert job.id == job_id
    api.move(job_id, "submitted")
    with pytest.raises(ApiError, match="has changed since") as refused:
        by.call(api.url, lambda client: client.cancel(job_id, if_match=etag))
    assert refused.value.problem.status == 412


def test_a_spec_may_be_a_model_and_only_set_fields_are_sent(api, by):
    job = by.call(api.url, lambda client: client.submit_job("typed", JobSpec(steps=7, num_workers=1)))
    assert job.spec == JobSpec(steps=7, num_workers=1)


@pytest.mark.parametrize(
    ("url", "token", "message"),
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
def test_an_invalid_address_or_token_is_rejected_immediately(kind, url, token, message):
    with pytest.raises(ValueError, match=message):
        kind(url, token)
