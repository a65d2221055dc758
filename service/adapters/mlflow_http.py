"""HTTP client of MLflow for forwarded requests."""

import json
import ssl
from collections.abc import AsyncIterator, Iterable
from enum import StrEnum
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from service.domain.errors import UpstreamUnavailable

MAX_CONNECTIONS = 32
"""Connections per kind of request, so that slow downloads and uploads do not delay metrics."""
FORWARDED_HEADERS = (
    "accept",
    "accept-encoding",
    "content-type",
    "content-length",
    "range",
    "if-none-match",
    "user-agent",
)
"""Request headers that are forwarded; cookies and credentials of the caller are not."""
RETURNED_HEADERS = (
    "content-type",
    "content-length",
    "content-encoding",
    "content-disposition",
    "content-range",
    "accept-ranges",
    "cache-control",
    "etag",
    "last-modified",
)
"""Response headers that are returned; cookies are not."""


class Kind(StrEnum):
    """Kind of a request, which has its own connections."""

    READ = "read"
    METRICS = "metrics"
    UPLOAD = "upload"


class MlflowHttp:
    """Client of the MLflow server at `url`, with its secret.

    Each step of a request (connecting, the next part of a body) may take `timeout_seconds`.
    """

    def __init__(self, url: str, secret: str | None, timeout_seconds: float) -> None:
        self._clients = {
            kind: httpx.AsyncClient(
                base_url=url,
                headers={"Authorization": f"Bearer {secret}"} if secret else {},
                timeout=timeout_seconds,
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
                follow_redirects=False,
                trust_env=False,
                verify=_tls_context(),
                cookies=CookieJar(
                    DefaultCookiePolicy(allowed_domains=[])
                ),  # one caller's would go with another's
            )
            for kind in Kind
        }

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Iterable[tuple[str, str]] = (),
        headers: dict[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        kind: Kind = Kind.READ,
    ) -> httpx.Response:
        """Send a request and return the answer, body unread. Raises UpstreamUnavailable."""
        client, params = self._clients[kind], httpx.QueryParams(tuple(query))
        sent = {name: value for name, value in (headers or {}).items() if name in FORWARDED_HEADERS}
        request = client.build_request(method, path, params=params or None, headers=sent, content=content)
        try:
            return await client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise UpstreamUnavailable(f"MLflow did not answer: {type(error).__name__}") from error

    async def get_json(self, path: str) -> Any:
        """Return a JSON answer, or None without success. Raises UpstreamUnavailable."""
        answer = await self.send("GET", path, kind=Kind.METRICS)
        try:
            return json.loads(await answer.aread()) if answer.is_success else None
        except (httpx.HTTPError, ValueError) as error:
            raise UpstreamUnavailable(f"MLflow did not answer: {type(error).__name__}") from error
        finally:
            await answer.aclose()

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()


@cache  # loading the certificates takes some 20 ms
def _tls_context() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)
