"""HTTP POST to addresses of users, with protection against SSRF.

Networks that only the service reaches are refused unless the operator allows them.
"""

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from urllib.parse import urlsplit

import httpcore

from service.domain.webhooks import IPAddress, IPNetwork, is_in, may_be_reached
from trainer.jobspec import InvalidField

RESOLVE_TIMEOUT_SECONDS = 5.0
MAX_CONCURRENT_LOOKUPS = 32
"""Maximum number of name lookups at the same time."""
PORTS = {"https": 443, "http": 80}


class Forbidden(httpcore.ConnectError):
    """A host resolves to an address that must not be reached."""


class Resolver:
    """Resolver in separate threads, so that a slow name server delays nothing else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT_LOOKUPS, thread_name_prefix="names")

    async def look_up(self, host: str, port: int) -> list[IPAddress]:
        """Resolve a host name. Raises OSError and UnicodeError."""
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        async with asyncio.timeout(RESOLVE_TIMEOUT_SECONDS):
            found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return list(dict.fromkeys(ip_address(str(item[4][0]).partition("%")[0]) for item in found))

    def close(self) -> None:
        """Stop without waiting for running lookups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class SsrfGuard(httpcore.AsyncNetworkBackend):
    """Network backend that connects only to addresses that it has checked.

    It prevents SSRF and DNS rebinding.
    """

    def __init__(self, names: Resolver, may_be_reached: Callable[[IPAddress], bool]) -> None:
        self._names, self._may_be_reached, self._backend = names, may_be_reached, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers.

        Raises Forbidden for private addresses.
        """
        addresses = await self._names.look_up(host, port)
        # All, not any: the connection could use each of them. The check is repeated here, since DNS may have
        # changed since the webhook was created.
        if not all(map(self._may_be_reached, addresses)):
            raise Forbidden(f"{host} is not an address that messages are sent to")
        for place, address in enumerate(addresses):
            try:
                return await self._backend.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if place == len(addresses) - 1:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")


class WebhookHttp:
    """HTTP client of webhooks; `allowed` are private networks that it may reach."""

    def __init__(self, allowed: Sequence[IPNetwork], seconds: float) -> None:
        self._allowed, self._seconds, self._names = allowed, seconds, Resolver()
        # A pool per scheme, as plain HTTP may go to fewer addresses. The sender limits concurrency.
        self._pools = {
            scheme: httpcore.AsyncConnectionPool(
                network_backend=SsrfGuard(self._names, may), max_connections=None, keepalive_expiry=5
            )
            for scheme, may in (
                ("https", lambda address: may_be_reached(address, allowed)),
                ("http", lambda address: is_in(address, allowed)),
            )
        }

    async def check(self, url: str) -> None:
        """Raise InvalidField for an address to which no message would be sent."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if parts.username is not None or parts.password is not None:
            raise InvalidField("url", url, "must not contain a user name or password; messages are signed")
        try:
            addresses = await self._names.look_up(host, parts.port or PORTS[parts.scheme])
        except (OSError, UnicodeError):
            raise InvalidField("url", url, f"host {host!r} does not resolve") from None
        if not all(may_be_reached(address, self._allowed) for address in addresses):
            raise InvalidField(
                "url", url, "must be a public address; the operator allows others by SYNCBN_WEBHOOK_NETWORKS"
            )
        if parts.scheme == "http" and not all(is_in(address, self._allowed) for address in addresses):
            raise InvalidField(
                "url", url, "must be https://; http:// only in networks of SYNCBN_WEBHOOK_NETWORKS"
            )

    async def post(self, url: str, body: str, headers: dict[str, str]) -> int:
        """POST a body and return the status. Redirects are not followed.

        Raises OSError or httpcore's errors if there is none in time.
        """
        sent = {"Content-Type": "application/json", "User-Agent": "syncbn-webhooks/1"} | headers
        async with (
            # A limit of the whole request; httpcore's timeouts are per operation, so a slow receiver could
            # stretch them.
            asyncio.timeout(self._seconds),
            self._pools[urlsplit(url).scheme].stream(
                "POST", url, headers=list(sent.items()), content=body.encode()
            ) as answer,
        ):
            return answer.status

    async def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            await pool.aclose()
        self._names.close()
