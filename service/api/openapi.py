"""OpenAPI document: errors, links and examples of each operation."""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from service.api.problems import MEDIA_TYPE
from service.api.schemas import ChangeJob, Problem, SubmitComparison, SubmitJob
from service.api.schemas.access import MakeSignInLink, MakeToken
from service.api.schemas.jobs import SPEC
from service.api.schemas.names import Examples
from service.api.schemas.problems import EXAMPLES as PROBLEMS
from service.api.schemas.webhooks import MakeWebhook
from trainer.jobspec import JobSpec

Operation = dict[str, Any]
OF_JOBS = {
    operation: {"job_id": "$response.body#/id"}
    for operation in (
        "show_job",
        "cancel_job",
        "pause_job",
        "resume_job",
        "clone_job",
        "list_events",
        "read_logs",
        "advise_job",
    )
}
OF_COMPARISONS = {
    operation: {"comparison_id": "$response.body#/id"}
    for operation in ("show_comparison", "report_comparison", "judge_comparison", "show_curves")
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
    "pause_job": OF_JOBS,
    "show_job": OF_JOBS,
    "list_jobs": {
        "list_jobs": {"page_token": "$response.body#/next_page_token"},
        **{operation: {"job_id": "$response.body#/jobs/0/id"} for operation in OF_JOBS},
    },
    "submit_comparison": {**OF_COMPARISONS, "list_jobs": {"comparison": "$response.body#/id"}},
    "list_comparisons": {
        "list_comparisons": {"page_token": "$response.body#/next_page_token"},
        **{operation: {"comparison_id": "$response.body#/comparisons/0/id"} for operation in OF_COMPARISONS},
    },
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
"""OpenAPI links: operations that accept a value of this operation's response, and where the value is."""
REQUESTS = (ChangeJob, MakeSignInLink, MakeToken, MakeWebhook, SubmitComparison, SubmitJob)
QUEUED = {"state": "queued", "reason": "submitted by the user"} | dict.fromkeys(
    ("progress", "mlflow_run_id", "mlflow_url", "started_at")
)
OF_A_COMPARISON = QUEUED | {
    "name": "norm=none seed=0",
    "comparison_id": "comparison-5b0e77c1d2aa",
    "variant": {"norm": "none", "seed": 0},
}
MORE_REQUESTS: dict[str, Examples] = {"clone_job": {"the same once more": {}}}
"""Examples that are invalid for another operation with the same schema."""
ANSWERS: dict[str, dict[str, Any]] = {
    "submit_job": QUEUED,
    "clone_job": QUEUED | {"cloned_from": "job-10aa92be77c0"},
    "resume_job": QUEUED | {"resumed_from": "job-10aa92be77c0"},
    "cancel_job": {"cancel_requested": True},
    "pause_job": {"pause_requested": True},
    "submit_comparison": {"jobs": OF_A_COMPARISON},
    "show_comparison": {"jobs": OF_A_COMPARISON},
    "validate_comparison": {"jobs": 8},
    "revoke_token": {"revoked_at": "2026-03-03T09:30:00Z"},
}
"""Fields that differ from the example of the response's schema, also in list items."""
ASK_OTHERS = {"report_comparison", "judge_comparison", "show_curves", "read_logs", "advise_job"}
"""Operations whose response depends on MLflow or Ray."""


def operation_id(route: APIRoute) -> str:
    """Return the operation id of a route: the name of its function."""
    return route.name


def document(app: FastAPI) -> dict[str, Any]:
    """Create the document of an application, once."""
    if app.openapi_schema is None:
        content = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        schemas = content["components"]["schemas"]
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"Problem": problem}
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of a 422
            schemas.pop(name, None)
        # Not in the model, since get_openapi leaves out what is null.
        schemas["JobSpec"]["examples"] = [JobSpec.model_validate(SPEC).model_dump(mode="json")]
        for path, operations in content["paths"].items():
            for method, operation in operations.items():
                _complete(path, method, operation, schemas)
        app.openapi_schema = content
    return app.openapi_schema


def _complete(path: str, method: str, operation: Operation, schemas: dict[str, Any]) -> None:
    answers = operation["responses"]
    # FastAPI adds its own 422; all errors of this API are problem details.
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
    answer = success.get("content", {}).get("application/json", {})
    if "$ref" in answer.get("schema", {}):
        example = answer["example"] = _example(answer["schema"], schemas)
        for field, value in ANSWERS.get(name, {}).items():
            is_list = isinstance(example[field], list)
            example[field] = [item | value for item in example[field]] if is_list else value
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]
        model = next(model for model in REQUESTS if body["schema"]["$ref"].endswith(f"/{model.__name__}"))
        requests = model.EXAMPLES | MORE_REQUESTS.get(name, {})
        body["examples"] = {
            summary: {"summary": summary, "value": value} for summary, value in requests.items()
        }


def _example(schema: Any, schemas: dict[str, Any]) -> Any:
    """Return the example of a schema, made of those of its fields."""
    if "$ref" in schema and "examples" not in schema:
        return _example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    match schema:
        case {"examples": [first, *_]} | {"default": first} | {"enum": [first, *_]}:
            return first
        case {"anyOf": [first, *_]}:
            return _example(first, schemas)
        case {"items": items}:
            return [_example(items, schemas)]
        case {"properties": fields}:
            return {name: _example(field, schemas) for name, field in fields.items()}
    return {"boolean": False, "object": {}}.get(schema.get("type"))


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
    if "Idempotency-Key" in parameters or operation["operationId"] == "judge_comparison":
        yield HTTPStatus.CONFLICT
    if "If-Match" in parameters:
        yield HTTPStatus.PRECONDITION_FAILED
    if operation["operationId"] in ASK_OTHERS:
        yield HTTPStatus.BAD_GATEWAY
