"""What is sent out, and what it keeps waiting: nothing else."""

import asyncio
import socket
import threading
from ipaddress import ip_network

import pytest

from service.adapters.run_storage import on_storage
from service.adapters.webhook_http import MOST_LOOK_UPS, Forbidden, WebhookHttp
from service.domain.errors import InvalidField
from tests.service.receiver import receiving


@pytest.fixture
def slow_names(monkeypatch):
    """Names that are not found before the test has ended."""
    ended, asked, look_up = threading.Event(), [], socket.getaddrinfo

    def wait(host, *arguments, **options):
        if host == "slow.example":
            asked.append(host)
            ended.wait(20)
            raise socket.gaierror("no such name")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr("service.adapters.webhook_http.socket.getaddrinfo", wait)
    yield asked
    ended.set()


async def test_what_is_not_encrypted_goes_to_allowed_networks_alone_also_when_a_name_has_another_address_since(
    monkeypatch,
):
    # All public addresses, and so this one, are reached by https: what is looked at is the scheme.
    monkeypatch.setattr("service.adapters.webhook_http.may_be_reached", lambda address, allowed: True)
    with receiving() as receiver:
        for allowed, is_sent in (("10.0.0.0/8", False), ("127.0.0.0/8", True)):
            outgoing = WebhookHttp([ip_network(allowed)], 2)
            if is_sent:
                assert await outgoing.post(receiver.url, "{}", {}) == 204
            else:
                with pytest.raises(Forbidden):
                    await outgoing.post(receiver.url, "{}", {})
            await outgoing.close()
    assert len(receiver.messages) == 1


async def test_slow_names_keep_no_look_at_files_waiting(slow_names):
    outgoing = WebhookHttp([], 5)
    checks = [asyncio.create_task(outgoing.check("https://slow.example/")) for _ in range(2 * MOST_LOOK_UPS)]
    async with asyncio.timeout(5):
        while len(slow_names) < MOST_LOOK_UPS:
            await asyncio.sleep(0.01)
        assert await on_storage(lambda: "read") == "read"
        assert await asyncio.to_thread(lambda: "done") == "done"
    for check in checks:
        check.cancel()
    await asyncio.gather(*checks, return_exceptions=True)
    await outgoing.close()


async def test_a_name_that_is_not_found_in_time_is_refused(slow_names, monkeypatch):
    monkeypatch.setattr("service.adapters.webhook_http.SECONDS_TO_RESOLVE", 0.1)
    outgoing = WebhookHttp([], 5)
    with pytest.raises(InvalidField, match="does not resolve"):
        await outgoing.check("https://slow.example/")
    await outgoing.close()


async def test_storage_that_hangs_keeps_nothing_else_waiting():
    started, ended = threading.Event(), threading.Event()

    def hang():
        started.set()
        ended.wait(20)

    looks = [asyncio.create_task(on_storage(hang)) for _ in range(64)]
    try:
        async with asyncio.timeout(5):
            while not started.is_set():
                await asyncio.sleep(0.01)
            assert await asyncio.to_thread(lambda: "done") == "done"
            with pytest.raises(InvalidField, match="public address"):
                await WebhookHttp([], 2).check("https://127.0.0.1/")
    finally:
        ended.set()
        await asyncio.gather(*looks)
