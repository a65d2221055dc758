"""Errors of calls, and retries with backoff.

Retries are written out because the libraries make them no shorter: a version on tenacity had as many lines,
and reset the count of a stream by writing into the state of tenacity. stamina reports retries by global
hooks, not by client, and waits for a `Retry-After` beyond the time limit before it gives up.
"""

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
"""Connection errors that a retry may avoid. Others, such as an unsupported protocol, are permanent."""


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
    """Limits on attempts and total time of a request.

    A stream starts from zero after every event.
    """

    max_attempts: int = 8
    total_seconds: float = 60
    """Time after which no further attempt starts; each may take the client's timeout."""
    first_pause_seconds: float = 0.5
    max_pause_seconds: float = 10


DEFAULT_RETRY_POLICY = RetryPolicy()


class Retrier:
    """Attempts of one request, with exponential backoff, jitter and `Retry-After`."""

    def __init__(self, retry_policy: RetryPolicy, on_retry: Callable[[str], None]) -> None:
        self._retry_policy, self._on_retry = retry_policy, on_retry
        self.reset()

    def reset(self) -> None:
        """Reset the count of attempts, as after an event of a stream."""
        self._made, self._deadline = 0, time.monotonic() + self._retry_policy.total_seconds

    def next_delay(self, error: ApiError) -> float:
        """Return the seconds until the next attempt; raise the error if there is none."""
        self._made += 1
        longest = min(
            self._retry_policy.first_pause_seconds * 2 ** (self._made - 1),
            self._retry_policy.max_pause_seconds,
        )
        # Jitter, so that clients that failed together do not return together.
        pause = max(error.retry_after_seconds, random.uniform(longest / 2, longest))  # noqa: S311
        if (
            not error.is_transient
            or self._made >= self._retry_policy.max_attempts
            or time.monotonic() + pause > self._deadline
        ):
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
        raise ApiError(
            f"{url} does not answer: {reason}", is_transient=isinstance(error, TRANSIENT)
        ) from error
    except ValidationError as error:
        raise ApiError(f"{url} did not answer as a syncbn service does: {error}") from error


def raise_for_status(url: str, answer: httpx.Response, ok_statuses: tuple[int, ...] = ()) -> None:
    """Raise ApiError if the status of an answer is an error.

    The body has been read.
    """
    status = answer.status_code
    if answer.is_success or status in ok_statuses:
        return
    after = answer.headers.get("Retry-After")
    # A conflict that passes, because the same request is being answered, says so; others do not.
    is_transient = status in (429, 500, 502, 503, 504) or (
        status == httpx.codes.CONFLICT and after is not None
    )
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
