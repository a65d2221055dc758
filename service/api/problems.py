"""Mapping of errors to HTTP problem details (RFC 9457)."""

import json
from collections.abc import Sequence
from http import HTTPStatus
from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.api.schemas import FieldError, Problem
from service.domain.errors import (
    Conflict,
    NotFound,
    QuotaExceeded,
    RequestInProgress,
    ServiceError,
    StorageFull,
    UpstreamRejected,
    UpstreamUnavailable,
    VersionMismatch,
)
from trainer.jobspec import InvalidField, NotAllowed, field_path

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[ServiceError], HTTPStatus] = {
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    RequestInProgress: HTTPStatus.CONFLICT,
    QuotaExceeded: HTTPStatus.FORBIDDEN,
    VersionMismatch: HTTPStatus.PRECONDITION_FAILED,
    UpstreamRejected: HTTPStatus.BAD_GATEWAY,
    UpstreamUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageFull: HTTPStatus.INSUFFICIENT_STORAGE,
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
MAX_ERRORS = 20
"""Maximum number of invalid fields in one response."""
MAX_VALUE_CHARS = 200
"""Maximum length of an invalid value that is sent back."""


def answer(
    status: HTTPStatus, detail: str, errors: Sequence[FieldError] = (), headers: dict[str, str] | None = None
) -> Response:
    """Return the answer for a problem."""
    problem = Problem(title=status.phrase, status=status, detail=detail, errors=list(errors))
    # Text from a request may hold half a surrogate pair, which UTF-8 cannot; as escapes of JSON everything
    # can be sent.
    content = json.dumps(problem.model_dump(), ensure_ascii=True)
    return Response(content, status, headers=headers, media_type=MEDIA_TYPE)


def too_large(most_bytes: int) -> str:
    """Return the message for a body that is too large."""
    return f"the body must have at most {most_bytes:,} bytes"


def install(app: FastAPI) -> None:
    """Register the error handlers of `app`."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(InvalidField, _on_invalid_field)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_mistake_of_ours)


def answer_of(request: Request, error: Exception) -> Response:
    """Return the answer for an error of a kind that has a handler."""
    handlers = (
        (RequestValidationError, _on_validation_error),
        (ServiceError, _on_service_error),
        (InvalidField, _on_invalid_field),
        (HTTPException, _on_http_exception),
    )
    handle = next(handle for kind, handle in handlers if isinstance(error, kind))
    return handle(request, error)


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if (
        isinstance(error.body, bytes) and error.body
    ):  # FastAPI has not read it, since it does not claim to be JSON
        sent = request.headers.get("Content-Type")
        item = FieldError(field="Content-Type", value=sent, message="must be application/json")
        return answer(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type: must be application/json (got {sent})", [item]
        )
    errors = [
        FieldError(
            field=_path(item["loc"], error.body), value=_short(item.get("input")), message=_message(item)
        )
        for item in islice(error.errors(), MAX_ERRORS)
    ]
    detail = "; ".join(f"{item.field}: {item.message}" for item in errors)
    if (more := len(error.errors()) - len(errors)) > 0:
        detail += f"; and {more} more"
    return answer(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors)


def _on_service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    headers = {"Retry-After": "1"} if isinstance(error, RequestInProgress | UpstreamUnavailable) else None
    return answer(STATUS[type(error)], str(error), headers=headers)


def _on_invalid_field(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidField)
    field = f"spec.{error.field}" if isinstance(error, NotAllowed) else error.field
    item = FieldError(field=field, value=_short(error.value), message=error.rule)
    return answer(HTTPStatus.UNPROCESSABLE_ENTITY, str(InvalidField(field, error.value, error.rule)), [item])


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, headers = HTTPStatus(error.status_code), dict(error.headers or {})
    match status:
        case HTTPStatus.BAD_REQUEST:  # not UTF-8, nested too deeply, or numbers of thousands of digits
            item = FieldError(field="body", message="must be JSON in UTF-8 within the size limits")
            return answer(status, f"{item.field}: {item.message}", [item], headers)
        case HTTPStatus.UNPROCESSABLE_ENTITY:  # of what a body holds, before its fields are looked at
            item = FieldError(field="body", message=str(error.detail))
            return answer(status, f"{item.field}: {item.message}", [item], headers)
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return answer(status, too_large(request.app.max_body_size), headers=headers)
        case HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods_of(request))
            return answer(
                status,
                f"method: must be {allowed} for {request.url.path} (got {request.method})",
                headers={"Allow": allowed},
            )
        case HTTPStatus.NOT_FOUND:  # of an address; what is not there at a known one is a NotFound
            return answer(status, f"there is nothing at {request.url.path}", headers=headers)
    return answer(status, str(error.detail), headers=headers)


def _methods_of(request: Request) -> list[str]:
    """Return the methods of all routes of an address.

    Starlette reports only those of the first.
    """
    scopes = [(method, {**request.scope, "method": method}) for method in METHODS]
    routes = request.app.router.routes
    return [
        method for method, scope in scopes if any(route.matches(scope)[0] == Match.FULL for route in routes)
    ]


def _on_mistake_of_ours(_: Request, error: Exception) -> Response:
    # Starlette logs the error with its traceback; who called learns no more than that it was not their fault.
    return answer(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the log of the service")


def _path(location: Sequence[str | int], body: Any) -> str:
    """Return the location of an error as a path into the request."""
    where, *parts = location
    return (field_path(parts, body) or "body") if where == "body" else ".".join(str(part) for part in parts)


def _message(item: dict[str, Any]) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    match item["type"]:
        case "missing":
            return "this field is required"
        case "extra_forbidden":
            return "there is no such field"
        case "json_invalid":
            return f"the body must be JSON: {item['ctx']['error']}"
        case "union_tag_invalid":
            return f"name must be one of {item['ctx']['expected_tags']}"
    return message


def _short(value: Any) -> Any:
    """Return a value as JSON for an answer, shortened if it is long."""
    if (
        isinstance(value, bool | int | float | None)
        and value == value
        and value not in (float("inf"), float("-inf"))
    ):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "…"
