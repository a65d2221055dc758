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
    """A part of a list."""

    next_page_token: str | None


P = TypeVar("P", bound=Page)
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[A]):
    """One request, however often it is sent."""

    method: Literal["GET", "POST", "DELETE"]
    route: str
    """As the OpenAPI document writes it."""
    read: Callable[[httpx.Response], A]
    """Raises ValueError if the answer is none of this API."""
    path: Mapping[str, str] = field(default_factory=dict)
    query: Content = field(default_factory=dict)
    body: Content | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[int, ...] = ()
    """States of HTTP that are no error here, beside those of success."""

    def request(self, client: httpx.Client | httpx.AsyncClient, timeout: httpx.Timeout) -> httpx.Request:
        """Make the request."""
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
    """A list that is read page by page."""

    first: Call[P]
    items: Callable[[P], Sequence[Item]]

    def after(self, page: P) -> Call[P] | None:
        """The call for the page after this one; None after the last."""
        if page.next_page_token is None:
            return None
        return replace(self.first, query={**self.first.query, "page_token": page.next_page_token})


def get(answer: type[M], route: str, query: Content | None = None, **path: str) -> Call[M]:
    """Make a call that asks."""
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
    """Make a call that changes something, once however often it is sent."""
    headers = {"Idempotency-Key": key or str(uuid4()), **(headers or {})}
    return Call(method="POST", route=route, path=path, body=body, headers=headers, read=_reads(answer))


def _reads(answer: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: answer.model_validate_json(response.content)


def read_text(response: httpx.Response) -> str:
    """Read an answer as text."""
    return response.text


def given(values: Content) -> dict[str, Any]:
    """What was given of optional values."""
    return {name: value for name, value in values.items() if value is not None}
