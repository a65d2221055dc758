"""ASGI middleware: time limits, declared body length, HEAD requests.

uvicorn has no time limits, so a client that sends half a request would keep its connection open without end.
"""

import asyncio
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api import problems

HEADER_SECONDS = 10.0
LINGER_SECONDS = 5.0
"""Time after the response in which the rest of the body is read and discarded."""
BODY_SECONDS = 60.0
"""Timeout of a whole body; under a path with large bodies, of each chunk."""


class HeaderDeadlineProtocol(HttpToolsProtocol):
    """uvicorn protocol that closes a connection whose header arrives too late.

    The same holds for the rest of an unread body.
    """

    header_seconds = HEADER_SECONDS
    linger_seconds = LINGER_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first header."""
        super().connection_made(transport)
        self._close_in(self.header_seconds)

    def on_message_begin(self) -> None:
        """Start the timeout of a header on a kept-alive connection."""
        super().on_message_begin()
        self._close_in(self.header_seconds)

    def on_headers_complete(self) -> None:
        """Stop waiting."""
        self._cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Start the timeout of the rest of an unread body, as of a refused request."""
        if self.cycle.more_body:
            self._close_in(self.linger_seconds)
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """Stop waiting."""
        self._cancel()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._cancel()
        super().connection_lost(exc)

    def _close_in(self, seconds: float) -> None:
        self._cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class BodyDeadline:
    """ASGI middleware that limits the time of bodies.

    A late body raises HTTPException with 408 in its reader.
    """

    def __init__(
        self, app: ASGIApp, seconds: float = BODY_SECONDS, large_under: tuple[str, ...] = ()
    ) -> None:
        """Allow `seconds` for a body.

        Under the path prefixes of `large_under`, for each part of it.
        """
        self._app, self._seconds, self._large_under = app, seconds, large_under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline, is_large = loop.time() + self._seconds, scope["path"].startswith(self._large_under)
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal is_complete
            if is_complete:  # what is left to receive is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(loop.time() + self._seconds if is_large else deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"the body did not arrive within {self._seconds:.0f} s"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, detail, {"Connection": "close"}) from None
            is_complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


class DeclaredLength:
    """ASGI middleware that refuses by `Content-Length`.

    Starlette's own limit would answer in plain text.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_bytes_under: dict[str, int]) -> None:
        """Allow `max_bytes`, or the limits of the prefixes in `max_bytes_under`."""
        self._app, self._max_bytes, self._max_bytes_under = app, max_bytes, max_bytes_under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        max_bytes = next(
            (
                limit
                for prefix, limit in self._max_bytes_under.items()
                if scope.get("path", "").startswith(prefix)
            ),
            self._max_bytes,
        )
        if declared.isdecimal() and int(declared) > max_bytes:
            refusal = problems.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problems.too_large(max_bytes))
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class HeadAsGet:
    """ASGI middleware that answers HEAD as GET without the body.

    A stream ends after its header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        is_answered = False

        async def send_header(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        async def receive_until_answered() -> Message:
            return {"type": "http.disconnect"} if is_answered else await receive()

        # The disconnect after the header makes a stream stop instead of producing a body that is dropped.
        await self._app({**scope, "method": "GET"}, receive_until_answered, send_header)
