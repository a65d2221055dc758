"""Errors of the control plane, one HTTP status each."""

from typing import Any


class ServiceError(Exception):
    """Base class of errors with a message for users."""


MAX_SHOWN = 200
"""Characters of a value that a message shows."""


class InvalidField(ServiceError):  # noqa: N818 - names say what is the case
    """A field of a request has an invalid value."""

    def __init__(self, field: str, value: Any, takes: str) -> None:
        super().__init__(f"{field}: {takes} (got {shown(value)})")
        self.field, self.value, self.takes = field, value, takes


class NotFound(ServiceError):  # noqa: N818
    """The object does not exist, or belongs to another owner."""


class Conflict(ServiceError):  # noqa: N818
    """The request conflicts with the state of the object."""


class RequestInProgress(ServiceError):  # noqa: N818
    """The first request with this idempotency key is in flight."""


class VersionMismatch(ServiceError):  # noqa: N818
    """The object has changed since the version in the request."""


class QuotaExceeded(ServiceError):  # noqa: N818
    """The request exceeds a quota of its owner."""


class UpstreamUnavailable(ServiceError):  # noqa: N818
    """Ray, MLflow or the database did not answer in time; a retry may succeed."""


class StorageFull(UpstreamUnavailable):
    """A disk that the service writes to is full."""


class UpstreamRejected(ServiceError):  # noqa: N818
    """Ray or MLflow refused a request; a retry helps only after a temporary error."""


def shown(value: Any) -> str:
    """Return a value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
