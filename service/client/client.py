"""Typed HTTP clients, blocking and asyncio."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from functools import cached_property
from typing import Literal, Self, TypeVar

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel

from service.api.schemas import ComparisonView
from service.client.call import Call, Listing, Page
from service.client.operations import Operations
from service.client.retry import (
    DEFAULT_RETRY_POLICY,
    ApiError,
    Retrier,
    RetryPolicy,
    raise_for_status,
    wrap_http_errors,
)
from service.client.sse import SILENCE_TIMEOUT_SECONDS, SseCursor, Stream

A = TypeVar("A")
E = TypeVar("E", bound=BaseModel)
P = TypeVar("P", bound=Page)
Item = TypeVar("Item")
POLL_INTERVAL_SECONDS = 0.5
BROKEN_OFF = "the stream ended before the job did"


class _Base(Operations):
    """Base of both clients.

    `url` is the service's address, `token` a bearer token. A try of a call may wait for `timeout_seconds` on
    the network. If the connection fails, or the service is too busy or reports a temporary error, the same
    request is sent again, by `retry_policy` and under the same Idempotency-Key; `on_retry` is called with a
    message. Other errors are raised as ApiError.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_seconds: float = 30,
        retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
        on_retry: Callable[[str], None] = lambda _: None,
    ) -> None:
        # httpx would fail only at the first request, with an error that does not name the token.
        if not (token.isascii() and token.isprintable() and token):
            raise ValueError("token: must be one or more visible ASCII characters")
        try:
            address = httpx.URL(url.rstrip("/"))
        except httpx.InvalidURL as error:
            raise ValueError(
                f"url: must be an address such as http://127.0.0.1:8000 ({error}; got {url!r})"
            ) from None
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"url: must be an address such as http://127.0.0.1:8000 (got {url!r})")
        self.url = str(address)
        self._headers = {"Authorization": f"Bearer {token}"}
        self._timeout = httpx.Timeout(timeout_seconds)
        self._stream_timeout = httpx.Timeout(timeout_seconds, read=SILENCE_TIMEOUT_SECONDS)
        self._retry_policy, self._on_retry = retry_policy, on_retry

    def _retrier(self) -> Retrier:
        return Retrier(self._retry_policy, self._on_retry)


class Client(_Base):
    """Blocking client; a context manager."""

    is_async: Literal[False] = False

    @cached_property
    def _http(self) -> httpx.Client:
        # trust_env: a proxy or .netrc of the environment would receive or replace the token.
        return httpx.Client(base_url=self.url, headers=self._headers, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def send(self, call: Call[A]) -> A:
        """Send a request with retries and return its parsed answer. Raises ApiError."""
        retrier = self._retrier()
        request = call.request(self._http, self._timeout)
        while True:
            try:
                with wrap_http_errors(self.url):
                    answer = self._http.send(request)
                    raise_for_status(self.url, answer, call.ok_statuses)
                    return call.read(answer)
            except ApiError as error:
                time.sleep(retrier.next_delay(error))

    def paginate(self, listing: Listing[P, Item]) -> Iterator[Item]:
        """Yield the items of all pages, loaded as needed."""
        call: Call[P] | None = listing.first
        while call is not None:
            page = self.send(call)
            yield from listing.items(page)
            call = listing.after(page)

    def follow(self, stream: Stream[E]) -> Iterator[E]:
        """Yield the events of a stream to its end, reconnecting as needed.

        Raises ApiError.
        """
        following = SseCursor(stream, self._retrier())
        while not following.is_over:
            try:
                with wrap_http_errors(self.url):
                    request = following.call().request(self._http, self._stream_timeout)
                    with closing(self._http.send(request, stream=True)) as answer:
                        if not answer.is_success:
                            answer.read()
                        raise_for_status(self.url, answer)
                        following.open(answer)
                        for event in EventSource(answer).iter_sse():
                            if (taken := following.take(event)) is not None:
                                yield taken
                            if following.is_over:
                                return
                raise ApiError(BROKEN_OFF, is_transient=True)
            except ApiError as error:
                time.sleep(following.next_delay(error))

    def wait(
        self, comparison_id: str, timeout_seconds: float, watch: Callable[[ComparisonView], None]
    ) -> ComparisonView:
        """Wait until all jobs of a comparison have ended; `watch` gets each poll.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_seconds
        while not _has_ended(comparison := self.comparison(comparison_id), deadline, watch):
            time.sleep(POLL_INTERVAL_SECONDS)
        return comparison


class AsyncClient(_Base):
    """Client for asyncio; an asynchronous context manager."""

    is_async: Literal[True] = True

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers=self._headers, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, call: Call[A]) -> A:
        """Send a request with retries and return its parsed answer. Raises ApiError."""
        retrier = self._retrier()
        request = call.request(self._http, self._timeout)
        while True:
            try:
                with wrap_http_errors(self.url):
                    answer = await self._http.send(request)
                    raise_for_status(self.url, answer, call.ok_statuses)
                    return call.read(answer)
            except ApiError as error:
                await asyncio.sleep(retrier.next_delay(error))

    async def paginate(self, listing: Listing[P, Item]) -> AsyncIterator[Item]:
        """Yield the items of all pages, loaded as needed."""
        call: Call[P] | None = listing.first
        while call is not None:
            page = await self.send(call)
            for item in listing.items(page):
                yield item
            call = listing.after(page)

    async def follow(self, stream: Stream[E]) -> AsyncIterator[E]:
        """Yield the events of a stream to its end, reconnecting as needed.

        Raises ApiError.
        """
        following = SseCursor(stream, self._retrier())
        while not following.is_over:
            try:
                with wrap_http_errors(self.url):
                    request = following.call().request(self._http, self._stream_timeout)
                    async with aclosing(await self._http.send(request, stream=True)) as answer:
                        if not answer.is_success:
                            await answer.aread()
                        raise_for_status(self.url, answer)
                        following.open(answer)
                        async for event in EventSource(answer).aiter_sse():
                            if (taken := following.take(event)) is not None:
                                yield taken
                            if following.is_over:
                                return
                raise ApiError(BROKEN_OFF, is_transient=True)
            except ApiError as error:
                await asyncio.sleep(following.next_delay(error))

    async def wait(
        self, comparison_id: str, timeout_seconds: float, watch: Callable[[ComparisonView], None]
    ) -> ComparisonView:
        """Wait until all jobs of a comparison have ended; `watch` gets each poll.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_seconds
        get = self.comparison
        while not _has_ended(comparison := await get(comparison_id), deadline, watch):  # noqa: ASYNC110
            await asyncio.sleep(POLL_INTERVAL_SECONDS)
        return comparison


def _has_ended(comparison: ComparisonView, deadline: float, watch: Callable[[ComparisonView], None]) -> bool:
    watch(comparison)
    if all(job.state.is_terminal for job in comparison.jobs):
        return True
    if time.monotonic() > deadline:
        raise TimeoutError(f"{comparison.id} has not ended in the time that was given")
    return False
