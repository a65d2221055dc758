"""Schemas of errors."""

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field


class FieldError(BaseModel):
    """Invalid field of a request."""

    field: str = Field(description="path into the body or name of the parameter")
    value: Any = Field(None, description="what was sent")
    message: str


class Problem(BaseModel):
    """Problem details (RFC 9457), sent as `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []


def _field(field: str, value: Any, rule: str) -> tuple[str, list[FieldError]]:
    return f"{field}: {rule}", [FieldError(field=field, value=value, message=rule)]


EXAMPLES: dict[HTTPStatus, Problem] = {
    status: Problem(title=status.phrase, status=status, detail=detail, errors=errors)
    for status, (detail, errors) in {
        HTTPStatus.BAD_REQUEST: _field("body", None, "must be JSON in UTF-8 within the size limits"),
        HTTPStatus.UNAUTHORIZED: (
            "this call needs the header `Authorization: Bearer <token>` with a valid token",
            [],
        ),
        HTTPStatus.FORBIDDEN: ("this call needs a token with scope submit; this one has read", []),
        HTTPStatus.NOT_FOUND: ("there is no job 'job-3f9c2b7a10de'", []),
        HTTPStatus.CONFLICT: (
            "Idempotency-Key: the first request with this key has not been answered yet",
            [],
        ),
        HTTPStatus.PRECONDITION_FAILED: (
            "job job-3f9c2b7a10de has changed since: it is running, attempt 1 is running",
            [],
        ),
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("the body must have at most 256,000 bytes", []),
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: _field("Content-Type", "text/plain", "must be application/json"),
        HTTPStatus.UNPROCESSABLE_ENTITY: _field(
            "spec.global_batch_size",
            1,
            "must be between 2 and 4000 for 2 workers with norm 'sync' on 'mnist5k'",
        ),
        HTTPStatus.TOO_MANY_REQUESTS: ("too many requests; try again in 1 s", []),
        HTTPStatus.INTERNAL_SERVER_ERROR: ("internal error; see the log of the service", []),
        HTTPStatus.BAD_GATEWAY: ("MLflow refused: INVALID_PARAMETER_VALUE", []),
        HTTPStatus.SERVICE_UNAVAILABLE: ("Ray did not answer", []),
        HTTPStatus.INSUFFICIENT_STORAGE: ("the storage has no space left: No space left on device", []),
    }.items()
}
