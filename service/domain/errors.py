"""Errors of the control plane, one HTTP status each."""

from typing import Any


class ServiceError(Exception):
    """Base of all errors whose message is meant for the user."""


MAX_SHOWN = 200
"""Characters of a value that a message shows."""


class InvalidField(ServiceError):  # noqa: N818 - names say what is the case
    """A field of a request holds a value that cannot be taken."""

    def __init__(self, field: str, value: Any, takes: str) -> None:
        super().__init__(f"{field}: {takes} (got {shown(value)})")
        self.field, self.value, self.takes = field, value, takes


class NotFound(ServiceError):  # noqa: N818
    """No such job or comparison."""


class Conflict(ServiceError):  # noqa: N818
    """The request does not fit the state that the thing is in."""


class RequestInProgress(ServiceError):  # noqa: N818
    """The same request came before, and has not been answered yet; its answer will be there soon."""


class VersionMismatch(ServiceError):  # noqa: N818
    """The thing is not any more what the request says that it is."""


class QuotaExceeded(ServiceError):  # noqa: N818
    """The request would take more than its owner may have."""


class UpstreamUnavailable(ServiceError):  # noqa: N818
    """Ray, MLflow or the database did not answer, or not in time; trying again may help."""


class StorageFull(UpstreamUnavailable):
    """A disk that the service writes to is full."""


class UpstreamRejected(ServiceError):  # noqa: N818
    """Ray or MLflow answered that it does not take something; trying again helps only if the trouble was a passing one."""


def shown(value: Any) -> str:
    """Write a value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
