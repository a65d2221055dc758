"""Outgoing webhook requests, and independence of other work from them."""

import asyncio
import socket
import threading
from ipaddress import ip_network

import pytest

from service.adapters.run_storage import on_storage
from service.adapters.webhook_http import MAX_CONCURRENT_LOOKUPS, Forbidden, WebhookHttp
from tests.service.receiver import receiving
from trainer.jobspec import InvalidField


@pytest.fixture
def slow_names(monkeypatch):
    """Names that do not resolve during the test."""
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


async def test_plain_http_reaches_only_allowed_networks_even_after_a_dns_change(
    monkeypatch,
):
    # All public addresses, and so this one, need https: the scheme is what is tested.
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


async def test_slow_name_resolution_does_not_delay_file_access(slow_names):
    outgoing = WebhookHttp([], 5)
    checks = [
        asyncio.create_task(outgoing.check("https://slow.example/"))
        for _ in range(2 * MAX_CONCURRENT_LOOKUPS)
    ]
    async with asyncio.timeout(5):
        while len(slow_names) < MAX_CONCURRENT_LOOKUPS:
            await asyncio.sleep(0.01)
        assert await on_storage(lambda: "read") == "read"
        assert await asyncio.to_thread(lambda: "done") == "done"
    for check in checks:
        check.cancel()
    await asyncio.gather(*checks, return_exceptions=True)
    await outgoing.close()


async def test_a_name_that_does_not_resolve_in_time_is_rejected(slow_names, monkeypatch):
    monkeypatch.setattr("service.adapters.webhook_http.RESOLVE_TIMEOUT_SECONDS", 0.1)
    outgoing = WebhookHttp([], 5)
    with pytest.raises(InvalidField, match="does not resolve"):
        await outgoing.check("https://slow.example/")
    await outgoing.close()


async def test_hanging_storage_does_not_delay_other_work():
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
