"""Methods of both clients, made from the descriptions of calls."""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from pydantic import BaseModel

from service.client import calls, sse
from service.client.call import Call, Listing, Page
from service.client.sse import Stream

A = TypeVar("A")
E = TypeVar("E", bound=BaseModel)
P = TypeVar("P", bound=Page)
Item = TypeVar("Item")
Given = ParamSpec("Given")


class Sender(Protocol):
    """Blocking client."""

    is_async: Literal[False]

    def send(self, call: Call[A]) -> A:
        """Send a call and return its result."""

    def paginate(self, listing: Listing[P, Item]) -> Iterator[Item]:
        """Iterate over the items of all pages of a list."""

    def follow(self, stream: Stream[E]) -> Iterator[E]:
        """Iterate over the events of a stream."""


class AsyncSender(Protocol):
    """asyncio client."""

    is_async: Literal[True]

    def send(self, call: Call[A]) -> Coroutine[Any, Any, A]:
        """Send a call and return its result."""

    def paginate(self, listing: Listing[P, Item]) -> AsyncIterator[Item]:
        """Iterate over the items of all pages of a list."""

    def follow(self, stream: Stream[E]) -> AsyncIterator[E]:
        """Iterate over the events of a stream."""


class Sent(Generic[Given, A]):
    """Descriptor of a method that sends one call."""

    def __init__(self, describe: Callable[Given, Call[A]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, client: Sender, kind: type) -> Callable[Given, A]: ...
    @overload
    def __get__(self, client: AsyncSender, kind: type) -> Callable[Given, Coroutine[Any, Any, A]]: ...
    def __get__(
        self, client: Sender | AsyncSender, kind: type
    ) -> Callable[Given, A | Coroutine[Any, Any, A]]:
        @wraps(self._describe)
        def method(*args: Given.args, **kwargs: Given.kwargs) -> A | Coroutine[Any, Any, A]:
            return client.send(self._describe(*args, **kwargs))

        return method


class Listed(Generic[Given, P, Item]):
    """Descriptor of a method that iterates over a list."""

    def __init__(self, describe: Callable[Given, Listing[P, Item]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, client: Sender, kind: type) -> Callable[Given, Iterator[Item]]: ...
    @overload
    def __get__(self, client: AsyncSender, kind: type) -> Callable[Given, AsyncIterator[Item]]: ...
    def __get__(
        self, client: Sender | AsyncSender, kind: type
    ) -> Callable[Given, Iterator[Item] | AsyncIterator[Item]]:
        @wraps(self._describe)
        def method(*args: Given.args, **kwargs: Given.kwargs) -> Iterator[Item] | AsyncIterator[Item]:
            return client.paginate(self._describe(*args, **kwargs))

        return method


class Followed(Generic[Given, E]):
    """Descriptor of a method that follows a stream."""

    def __init__(self, describe: Callable[Given, Stream[E]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, client: Sender, kind: type) -> Callable[Given, Iterator[E]]: ...
    @overload
    def __get__(self, client: AsyncSender, kind: type) -> Callable[Given, AsyncIterator[E]]: ...
    def __get__(
        self, client: Sender | AsyncSender, kind: type
    ) -> Callable[Given, Iterator[E] | AsyncIterator[E]]:
        @wraps(self._describe)
        def method(*args: Given.args, **kwargs: Given.kwargs) -> Iterator[E] | AsyncIterator[E]:
            return client.follow(self._describe(*args, **kwargs))

        return method


class Operations:
    """Methods of the API."""

    submit_job = Sent(calls.submit_job)
    validate_job = Sent(calls.validate_job)
    job = Sent(calls.job)
    job_with_etag = Sent(calls.job_with_etag)
    jobs = Listed(calls.jobs)
    cancel = Sent(calls.cancel)
    pause = Sent(calls.pause)
    resume = Sent(calls.resume)
    clone = Sent(calls.clone)
    events = Sent(calls.events)
    follow_events = Followed(sse.follow_events)
    logs = Sent(calls.logs)
    advice = Sent(calls.advice)
    follow_logs = Followed(sse.follow_logs)
    submit_comparison = Sent(calls.submit_comparison)
    validate_comparison = Sent(calls.validate_comparison)
    comparison = Sent(calls.comparison)
    comparisons = Listed(calls.comparisons)
    report = Sent(calls.report)
    document = Sent(calls.document)
    verdict = Sent(calls.verdict)
    curves = Sent(calls.curves)
    me = Sent(calls.me)
    create_sign_in_link = Sent(calls.create_sign_in_link)
    create_token = Sent(calls.create_token)
    tokens = Listed(calls.tokens)
    revoke_token = Sent(calls.revoke_token)
    audit = Listed(calls.audit)
    create_webhook = Sent(calls.create_webhook)
    webhooks = Listed(calls.webhooks)
    webhook = Sent(calls.webhook)
    delete_webhook = Sent(calls.delete_webhook)
    deliveries = Listed(calls.deliveries)
    usage = Sent(calls.usage)
    cluster = Sent(calls.cluster)
    ready = Sent(calls.ready)
    alive = Sent(calls.alive)
    metrics = Sent(calls.metrics)
