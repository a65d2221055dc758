"""Errors of the control plane, one HTTP status each.

Invalid fields are errors of `trainer.jobspec.InvalidField`.
"""


class ServiceError(Exception):
    """Base class of errors with a message for users."""


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
