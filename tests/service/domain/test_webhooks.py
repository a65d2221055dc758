import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
from standardwebhooks import Webhook as Receiver
from standardwebhooks import WebhookVerificationError

from service.domain.jobs import JobState
from service.domain.webhooks import (
    PAUSES_SECONDS,
    Threshold,
    Webhook,
    is_in,
    may_be_reached,
    new_webhook_secret,
    pause_after,
    read_networks,
    signed_headers,
    write_message,
)
from tests.service.examples import make_job

NOW = datetime.now(UTC)


def test_signatures_verify_with_the_standardwebhooks_library():
    secret, body = new_webhook_secret(), '{"type": "job.failed", "data": {"reason": "größer"}}'
    headers = signed_headers(secret, "message-1", datetime.now(UTC), body)  # receivers accept five minutes
    timestamp = int(headers["webhook-timestamp"])
    assert Receiver(secret).verify(body, headers) == json.loads(body)
    for changed in ({"webhook-id": "message-2"}, {"webhook-timestamp": str(timestamp + 1)}):
        with pytest.raises(WebhookVerificationError):
            Receiver(secret).verify(body, headers | changed)
    with pytest.raises(WebhookVerificationError):
        Receiver(new_webhook_secret()).verify(body, headers)


def test_headers_follow_standard_webhooks():
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", '{"reason": "größer"}'
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"message-1.1614265330.{body}".encode()
    digest = hmac.new(key, content, hashlib.sha256).digest()
    assert signed_headers(secret, "message-1", datetime.fromtimestamp(1_614_265_330.9, UTC), body) == {
        "webhook-id": "message-1",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1", "2002:5db8:d70e::1", "::127.0.0.1", "::10.0.0.1",
        "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1", "fec0::1", "5f00::1", "3fff::1", "2001:db8:1::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2", "100::1", "192.88.99.1", "168.63.129.16", "192.0.0.192",
    ],
)  # fmt: skip
def test_private_addresses_are_rejected_unless_allowed(address):
    assert not may_be_reached(ip_address(address), ())
    assert not may_be_reached(ip_address(address), read_networks("192.0.2.0/24, 2001:db8:2::/48"))


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"]
)
def test_public_addresses_are_allowed(address):
    assert may_be_reached(ip_address(address), ())


def test_operators_can_allow_networks():
    allowed = read_networks("10.1.0.0/16, ::1/128")
    assert may_be_reached(ip_address("10.1.2.3"), allowed)
    assert may_be_reached(ip_address("::ffff:10.1.2.3"), allowed)
    assert may_be_reached(ip_address("::1"), allowed)
    assert may_be_reached(ip_address("168.63.129.16"), read_networks("168.63.129.16/32"))
    assert is_in(ip_address("::ffff:10.1.2.3"), allowed)
    assert not may_be_reached(ip_address("10.2.2.3"), allowed)


@pytest.mark.parametrize(
    ("relation", "value", "is_met"),
    [
        ("at_least", 0.9, True),
        ("at_least", 0.8, False),
        ("at_most", 0.9, True),
        ("at_most", 1.0, False),
        ("at_least", float("nan"), False),
        ("at_most", float("nan"), False),
        ("at_least", float("inf"), True),
    ],
)
def test_thresholds(relation, value, is_met):
    assert Threshold(metric="accuracy", relation=relation, bound=0.9).is_met(value) == is_met


def test_a_message_names_the_job_and_its_outcome():
    job = make_job(state=JobState.FAILED, reason="out of memory", tags=("nightly",))
    message = json.loads(write_message(job, NOW))
    assert message["type"] == "job.failed"
    assert message["data"]["job_id"] == job.id
    assert message["data"]["reason"] == "out of memory"


def test_a_threshold_message_is_json_for_non_finite_values():
    met = Threshold(metric="loss", relation="at_least", bound=10.0)
    text = write_message(make_job(), NOW, met, 7, float("inf"))
    message = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert message["type"] == "job.threshold"
    assert message["data"]["threshold"] == {
        "metric": "loss",
        "relation": "at_least",
        "bound": 10.0,
        "step": 7,
        "value": "inf",
    }


def test_a_webhook_matches_jobs_of_its_owner_and_tag():
    hook = Webhook(id="w", owner="ann", url="https://a", secret="s", states=(), tag="nightly", created_at=NOW)
    assert hook.is_about(make_job(owner="ann", tags=("nightly",)))
    assert not hook.is_about(make_job(owner="bob", tags=("nightly",)))
    assert not hook.is_about(make_job(owner="ann"))


def test_attempts_are_limited():
    assert [pause_after(attempts) for attempts in range(1, 10)] == [*PAUSES_SECONDS, None]


def test_only_the_host_of_a_secret_url_is_shown():
    url = "https://hooks.example.org:8443/services/T00/B00/secret?key=secret"
    assert (
        Webhook(id="w", owner="ann", url=url, secret="s", states=(), created_at=NOW).host
        == "https://hooks.example.org"
    )
