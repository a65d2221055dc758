"""Description of one API call, and of paged lists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from pydantic import BaseModel

Content = Mapping[str, Any]
A = TypeVar("A")
M = TypeVar("M", bound=BaseModel)


class Page(Protocol):
    """Page of a list."""

    next_page_token: str | None


P = TypeVar("P", bound=Page)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[A]):
    """Description of one request."""

    method: Literal["GET", "POST", "DELETE"]
    route: str
    """Path template, as in the OpenAPI document."""
    read: Callable[[httpx.Response], A]
    """Function that parses the response. Raises ValueError if it is not a response of this API."""
    path: Mapping[str, str] = field(default_factory=dict)
    query: Content = field(default_factory=dict)
    body: Content | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    ok_statuses: tuple[int, ...] = ()
    """HTTP status codes that are not errors for this call, in addition to 2xx."""

    def request(self, client: httpx.Client | httpx.AsyncClient, timeout: httpx.Timeout) -> httpx.Request:
        """Build the HTTP request."""
        address = self.route.format_map({name: quote(value, safe="") for name, value in self.path.items()})
        return client.build_request(
            self.method,
            address,
            params=given(self.query),
            json=self.body,
            headers=dict(self.headers),
            timeout=timeout,
        )


@dataclass(frozen=True)
class Listing(Generic[P, Item]):
    """List that is read page by page."""

    first: Call[P]
    items: Callable[[P], Sequence[Item]]

    def after(self, page: P) -> Call[P] | None:
        """Return the call for the next page; None after the last."""
        if page.next_page_token is None:
            return None
        return replace(self.first, query={**self.first.query, "page_token": page.next_page_token})


def get(answer: type[M], route: str, query: Content | None = None, **path: str) -> Call[M]:
    """Return a GET call."""
    return Call(method="GET", route=route, path=path, query=query or {}, read=_reads(answer))


def post(
    answer: type[M],
    route: str,
    body: Content | None = None,
    *,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    **path: str,
) -> Call[M]:
    """Return a POST call with an idempotency key."""
    headers = {"Idempotency-Key": key or str(uuid4()), **(headers or {})}
    return Call(method="POST", route=route, path=path, body=body, headers=headers, read=_reads(answer))


def _reads(answer: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: answer.model_validate_json(response.content)


def read_text(response: httpx.Response) -> str:
    """Read an answer as text."""
    return response.text


def given(values: Content) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
