"""Errors of calls, and retries with backoff."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from pydantic import ValidationError

from service.api.schemas import Problem

TRANSIENT = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""The others are mistakes, such as an address of another protocol, and come again."""


class ApiError(Exception):
    """The API refused a request or did not answer.

    `problem` is its answer, if there is one; `is_transient` means that the same request may succeed later.
    """

    def __init__(
        self,
        message: str,
        problem: Problem | None = None,
        *,
        is_transient: bool = False,
        retry_after_seconds: float = 0,
    ) -> None:
        super().__init__(message)
        self.problem, self.is_transient, self.retry_after_seconds = problem, is_transient, retry_after_seconds


@dataclass(frozen=True)
class RetryPolicy:
    """Limits on tries and total time of a request; a stream starts from zero after every event."""

    tries: int = 8
    total_seconds: float = 60
    """No try begins later than this; each may take the client's time limit."""
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 10


PATIENT = RetryPolicy()


class Retrier:
    """Tries of one request, with exponential backoff, jitter and `Retry-After`."""

    def __init__(self, patience: RetryPolicy, on_retry: Callable[[str], None]) -> None:
        self._patience, self._on_retry = patience, on_retry
        self.reset()

    def reset(self) -> None:
        """Reset the count of tries, as after an event of a stream."""
        self._made, self._deadline = 0, time.monotonic() + self._patience.total_seconds

    def next_delay(self, error: ApiError) -> float:
        """Return the seconds until the next try; raise the error if there is none."""
        self._made += 1
        longest = min(self._patience.first_pause_seconds * 2 ** (self._made - 1), self._patience.longest_pause_seconds)
        pause = max(error.retry_after_seconds, random.uniform(longest / 2, longest))  # noqa: S311 - nothing secret
        if not error.is_transient or self._made >= self._patience.tries or time.monotonic() + pause > self._deadline:
            raise error
        self._on_retry(f"{error}; trying again in {pause:.1f} s")
        return pause


@contextmanager
def wrap_http_errors(url: str) -> Iterator[None]:
    """Convert errors of httpx, and answers that are not of this API, to ApiError."""
    try:
        yield
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ApiError(f"{url} does not answer: {reason}", is_transient=isinstance(error, TRANSIENT)) from error
    except ValidationError as error:
        raise ApiError(f"{url} did not answer as a syncbn service does: {error}") from error


def raise_for_status(url: str, answer: httpx.Response, takes: tuple[int, ...] = ()) -> None:
    """Raise ApiError if the status of an answer, whose body has been read, is an error."""
    status = answer.status_code
    if answer.is_success or status in takes:
        return
    after = answer.headers.get("Retry-After")
    # A conflict that passes, because the same request is being answered, says so; others do not.
    is_transient = status in (429, 500, 502, 503, 504) or (status == httpx.codes.CONFLICT and after is not None)
    try:
        problem = Problem.model_validate_json(answer.content)
        message = problem.detail
    except ValidationError:
        problem, message = None, f"{url} answered {status}: {answer.text[:200]}"
    raise ApiError(message, problem, is_transient=is_transient, retry_after_seconds=_seconds(after))


def _seconds(after: str | None) -> float:
    """Parse a `Retry-After` header: seconds, or a date."""
    if after is None or after.isdecimal():
        return float(after or 0)
    try:
        return (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
