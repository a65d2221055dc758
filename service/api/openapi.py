"""OpenAPI document: errors, links and examples of each operation."""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from service.api.examples.answers import ANSWERS, PROBLEMS
from service.api.examples.requests import REQUESTS
from service.api.problems import MEDIA_TYPE
from service.api.schemas import Problem

Operation = dict[str, Any]
OF_JOBS = {
    operation: {"job_id": "$response.body#/id"}
    for operation in ("show_job", "cancel_job", "resume_job", "clone_job", "list_events", "read_logs")
}
OF_COMPARISONS = {
    operation: {"comparison_id": "$response.body#/id"}
    for operation in ("show_comparison", "report_comparison", "show_curves")
}
OF_WEBHOOKS = {
    operation: {"webhook_id": "$response.body#/id"}
    for operation in ("show_webhook", "list_deliveries", "delete_webhook")
}
LINKS: dict[str, dict[str, dict[str, str]]] = {
    "submit_job": OF_JOBS,
    "clone_job": OF_JOBS,
    "resume_job": OF_JOBS,
    "cancel_job": OF_JOBS,
    "show_job": OF_JOBS,
    "list_jobs": {
        "list_jobs": {"page_token": "$response.body#/next_page_token"},
        **{operation: {"job_id": "$response.body#/jobs/0/id"} for operation in OF_JOBS},
    },
    "submit_comparison": {**OF_COMPARISONS, "list_jobs": {"comparison": "$response.body#/id"}},
    "show_comparison": {**OF_COMPARISONS, "show_job": {"job_id": "$response.body#/jobs/0/id"}},
    "make_webhook": OF_WEBHOOKS,
    "list_webhooks": {
        "list_webhooks": {"page_token": "$response.body#/next_page_token"},
        **{operation: {"webhook_id": "$response.body#/webhooks/0/id"} for operation in OF_WEBHOOKS},
    },
    "make_token": {"revoke_token": {"token_id": "$response.body#/id"}},
    "list_tokens": {"list_tokens": {"page_token": "$response.body#/next_page_token"}},
    "list_audit": {"list_audit": {"page_token": "$response.body#/next_page_token"}},
}
"""Of the answer of an operation: which others take what from it, and from where."""
ASK_OTHERS = {"report_comparison", "show_curves", "read_logs"}
"""Operations that answer by what MLflow or Ray say."""


def operation_id(route: APIRoute) -> str:
    """Return the operation id of a route: the name of its function."""
    return route.name


def document(app: FastAPI) -> dict[str, Any]:
    """Create the document of an application, once."""
    if app.openapi_schema is None:
        content = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
        )
        schemas = content["components"]["schemas"]
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"Problem": problem}
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of a 422
            schemas.pop(name, None)
        for path, operations in content["paths"].items():
            for method, operation in operations.items():
                _complete(path, method, operation)
        app.openapi_schema = content
    return app.openapi_schema


def _complete(path: str, method: str, operation: Operation) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    for status in sorted(_errors(path, method, operation)):
        answers[str(status.value)] = {
            "description": status.phrase,
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": PROBLEMS[status].model_dump(mode="json"),
                }
            },
        }
    name = operation["operationId"]
    success = next(answer for status, answer in answers.items() if status.startswith("2"))
    if (links := LINKS.get(name)) is not None:
        success["links"] = {
            target: {"operationId": target, "parameters": parameters} for target, parameters in links.items()
        }
    if (answer := ANSWERS.get(name)) is not None:
        success["content"]["application/json"]["example"] = answer.model_dump(mode="json")
    if (requests := REQUESTS.get(name)) is not None:
        named = {summary: {"summary": summary, "value": value} for summary, value in requests.items()}
        operation["requestBody"]["content"]["application/json"]["examples"] = named


def _errors(path: str, method: str, operation: Operation) -> Iterator[HTTPStatus]:
    """Return the possible errors of an operation, from its parameters and body."""
    if "security" not in operation:
        return
    parameters = {parameter["name"] for parameter in operation.get("parameters", ())}
    yield from (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
    yield from (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE)
    yield HTTPStatus.UNPROCESSABLE_ENTITY  # at least for a query parameter that there is none of
    if method != "get":
        yield HTTPStatus.INSUFFICIENT_STORAGE
    if "{" in path:
        yield HTTPStatus.NOT_FOUND
    if method == "post":
        yield from (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    if "requestBody" in operation:
        yield HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    if "Idempotency-Key" in parameters:
        yield HTTPStatus.CONFLICT
    if "If-Match" in parameters:
        yield HTTPStatus.PRECONDITION_FAILED
    if operation["operationId"] in ASK_OTHERS:
        yield HTTPStatus.BAD_GATEWAY
