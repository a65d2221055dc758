"""Incomplete requests, and forwarded addresses, on a real server."""

import asyncio

import pytest

from service.api.middleware import BodyDeadline, HeaderDeadlineProtocol
from tests.service.api.serving import TOKEN, serving


async def ask(port, *parts, read=True):
    """Send the parts of a request on one connection; return all that is received until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part.encode())
        await writer.drain()
    async with asyncio.timeout(20):
        answer = (await reader.read()).decode() if read else ""
    writer.close()
    return answer


HEAD = (
    f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: "
    "application/json\r\n"
)


async def test_incomplete_requests_time_out(tmp_path, monkeypatch):
    monkeypatch.setattr(HeaderDeadlineProtocol, "header_seconds", 1.0)
    monkeypatch.setattr("service.api.app.BODY_SECONDS", 1.0)
    async with serving(tmp_path) as port:
        halves = [
            ["GET /livez HTTP/1.1\r\nHost:"],  # no end of the header
            [""],  # nothing at all
            [HEAD + 'Content-Length: 100\r\n\r\n{"name":'],  # no end of the body
            [HEAD + 'Idempotency-Key: k\r\nContent-Length: 100\r\n\r\n{"name":'],
            [HEAD + 'Transfer-Encoding: chunked\r\n\r\n5\r\n{"nam\r\n'],
            [
                "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
                "GET /livez HT",
            ],  # a second request on the same connection
        ]
        header, nothing, body, keyed, chunked, second = await asyncio.gather(
            *(ask(port, *half) for half in halves)
        )
        assert header == nothing == ""
        for answer in (body, keyed, chunked):
            assert answer.startswith("HTTP/1.1 408")
            assert "the body did not arrive within 1 s" in answer
            assert "connection: close" in answer.lower()
        assert second.startswith("HTTP/1.1 200")
        many = await asyncio.gather(*(ask(port, halves[2][0]) for _ in range(200)))
        assert all(answer.startswith(("HTTP/1.1 408", "HTTP/1.1 429")) for answer in many)


async def test_the_rest_of_a_rejected_body_is_not_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr(HeaderDeadlineProtocol, "linger_seconds", 1.0)
    async with serving(tmp_path) as port:
        for head in (
            "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",  # without a token
            "POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
            HEAD + "Content-Length: 1000000000\r\n\r\n{",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode())
            assert (await reader.readuntil(b"\r\n")).split()[1] in (b"401", b"404", b"413")
            async with asyncio.timeout(5):
                for _ in range(100):  # single bytes now and then do not keep a connection open
                    try:
                        writer.write(b"x")
                        await writer.drain()
                        if await asyncio.wait_for(reader.read(65_536), 0.1) == b"":
                            break
                    except TimeoutError:
                        continue
                    except ConnectionError:
                        break
            writer.close()


async def test_a_slowly_read_stream_is_not_disconnected(tmp_path, monkeypatch):
    monkeypatch.setattr(HeaderDeadlineProtocol, "header_seconds", 0.5)
    async with serving(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # the connection is kept alive
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b'"alive"}')).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.7)
        writer.close()


async def test_the_time_limit_applies_to_each_chunk_of_a_body():
    async def read_all(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send("complete")

    parts = [{"type": "http.request", "body": b"x", "more_body": more} for more in (True, True, True, False)]

    async def receive():
        await asyncio.sleep(0.2)
        return parts.pop(0)

    sent = []

    async def send(message):
        sent.append(message)

    await BodyDeadline(read_all, 0.5, ("/large/",))({"type": "http", "path": "/large/x"}, receive, send)
    assert sent == ["complete"]


@pytest.mark.parametrize(("trusted", "is_limited"), [(None, True), ("127.0.0.1", False), ("10.0.0.1", True)])
async def test_forwarded_addresses_are_trusted_only_from_configured_proxies(
    tmp_path, caplog, trusted, is_limited
):
    caplog.set_level("INFO", "uvicorn.access")
    async with serving(tmp_path, trusted_proxies=trusted) as port:
        request = "GET /v1/me HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nConnection: close\r\n"
        answers = [await ask(port, f"{request}X-Forwarded-For: 203.0.113.{n}\r\n\r\n") for n in range(30)]
    assert any(answer.startswith("HTTP/1.1 429") for answer in answers) == is_limited
    assert ("203.0.113." in caplog.text) == (not is_limited)
