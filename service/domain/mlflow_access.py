"""Requests that may be forwarded to MLflow, per kind of caller.

There are two kinds of callers. Whoever has signed in may read: the paths of MLflow's pages and of queries. An
attempt of a job may write metrics, tags, inputs and artifacts of its run. Everything else is refused:
MLflow's assistant, gateway and job execution (which run commands and send data elsewhere), and creating or
deleting experiments and runs, which is the service's own work.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from trainer.jobspec import InvalidField

MAX_JSON_BYTES = 1_000_000
"""Maximum body of a query or of one batch of metrics; MLflow's limit of a batch."""
READABLE: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (method, re.compile(pattern))
    for method, pattern in (
        ("GET", r"/|/health|/version|/get-artifact|/static-files/.+"),
        ("GET", r"/(ajax-)?api/3\.0/mlflow/server-info"),
        ("GET", r"/(ajax-)?api/2\.0/mlflow/(experiments/(get|get-by-name|search)|runs/get|artifacts/list)"),
        ("GET", r"/(ajax-)?api/2\.0/mlflow/metrics/(get-history|get-history-bulk|get-history-bulk-interval)"),
        ("GET", r"/(ajax-)?api/2\.0/mlflow/logged-models/[\w-]+(/artifacts/(directories|files))?"),
        ("GET", r"/(ajax-)?api/2\.0/mlflow/(registered-models|model-versions)/(get|search)"),
        ("GET", r"/(ajax-)?api/2\.0/mlflow-artifacts/artifacts(/.*)?"),
        (
            "POST",
            r"/(ajax-)?api/2\.0/mlflow/"
            r"(experiments/(search|search-datasets)|runs/search|logged-models/search)",
        ),
        ("POST", r"/ajax-api/2\.0mlflow/experiments/search-datasets"),  # as MLflow's own page spells it
        ("POST", r"/(ajax-)?api/3\.0/mlflow/traces/search"),
        ("POST", r"/graphql"),  # also its mutations only search
    )
)
API = "/api/2.0/mlflow"
WRITABLE_FIELDS: dict[str, tuple[str, ...]] = {
    f"{API}/runs/log-batch": ("metrics", "tags"),
    f"{API}/runs/log-inputs": ("datasets",),
    f"{API}/runs/outputs": ("models",),
}
"""Calls by which an attempt writes to its run, and the fields that are forwarded; the run's id is always the
attempt's own.
"""
ENTRY_FIELDS: dict[str, tuple[str, ...]] = {
    "metrics": ("key", "value", "timestamp", "step"),
    "tags": ("key", "value"),
    "datasets": ("dataset", "tags"),
    "models": ("model_id", "step"),
}
"""Fields of their entries that are forwarded; a metric's `model_id` would write to a logged model of any
run.
"""
RESERVED_TAGS = frozenset(
    {"norm", "seed", "attempt", "world_size", "variant", "baseline", "metric", "git_commit"}
)
"""Tags that the service sets; with all that begin with `mlflow.` or `syncbn.`, an attempt may not change
them.
"""
RESERVED_PREFIXES = ("mlflow.", "syncbn.")


@dataclass(frozen=True)
class Grant:
    """Run that a running attempt may write to."""

    job_id: str
    run_id: str
    experiment_id: str


@dataclass(frozen=True)
class Forwarded:
    """Request of an attempt, as it is forwarded."""

    query: dict[str, str]
    body: dict[str, Any] | None = None
    """JSON to send in place of the caller's body; None: the body is sent as it comes (a file), or there is
    none.
    """
    model_id: str | None = None
    """A logged model that must have been made by the attempt's run."""
    is_counted: bool = False
    """Whether it adds a row of any size to MLflow, and so counts as an upload of the attempt."""


def is_clean(path: str) -> bool:
    """Return whether a decoded path is unambiguous.

    It then has no empty or dot parts, backslashes or control characters.
    """
    parts = path.removeprefix("/").split("/")
    has_odd_part = any(
        part in (".", "..") or (not part and at < len(parts) - 1) for at, part in enumerate(parts)
    )
    return path.startswith("/") and not has_odd_part and not re.search(r"[\\%\x00-\x1f\x7f]", path)


def is_readable(method: str, path: str) -> bool:
    """Return whether a signed-in caller may send this request.

    `path` is decoded and clean.
    """
    method = "GET" if method == "HEAD" else method
    return any(method == allowed and pattern.fullmatch(path) for allowed, pattern in READABLE)


def of_attempt(grant: Grant, method: str, path: str, query: dict[str, str], body: bytes) -> Forwarded | None:
    """Return the request of an attempt as it is forwarded; None if not allowed.

    Bodies are rebuilt from the fields that are allowed, so that no second spelling of a run's id passes the
    check. Raises InvalidField if the body is not a JSON object or names another run.
    """
    match method, path:
        case "GET", "/api/3.0/mlflow/server-info" | "/version" | "/health":
            return Forwarded({})
        case "GET", "/api/2.0/mlflow/runs/get":
            return Forwarded({"run_id": grant.run_id}) if query.get("run_id") == grant.run_id else None
        case "POST", _ if path in WRITABLE_FIELDS:
            fields = WRITABLE_FIELDS[path]
            return Forwarded(
                {}, _of_run(grant, read_object(body), fields), is_counted="metrics" not in fields
            )
        case "POST", "/api/2.0/mlflow/logged-models/search":
            content = {
                "experiment_ids": [grant.experiment_id],
                "filter": f"source_run_id = '{grant.run_id}'",
                "max_results": 100,
            }
            return Forwarded({}, content)
        case "POST", "/api/2.0/mlflow/logged-models":
            content = {
                "experiment_id": grant.experiment_id,
                "source_run_id": grant.run_id,
                "name": str(read_object(body).get("name", "model")),
            }
            return Forwarded({}, content, is_counted=True)
        case "GET", _ if found := re.fullmatch(
            rf"{API}/logged-models/([\w-]+)(/artifacts/directories)?", path
        ):
            return Forwarded({}, model_id=found[1])
        case "PATCH", _ if found := re.fullmatch(rf"{API}/logged-models/([\w-]+)", path):
            content = {"model_id": found[1], "status": read_object(body).get("status", "")}
            return Forwarded({}, content, model_id=found[1])
        case "PUT", _ if path.startswith(f"{API}-artifacts/artifacts/"):
            place = path.removeprefix(f"{API}-artifacts/artifacts/")
            if place.startswith(f"{grant.experiment_id}/{grant.run_id}/artifacts/"):
                return Forwarded({})
            model = re.match(rf"{re.escape(grant.experiment_id)}/models/([\w-]+)/artifacts/.", place)
            return Forwarded({}, model_id=model[1]) if model else None
    return None


def _of_run(grant: Grant, content: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    named = content.get("run_id", grant.run_id)
    if named != grant.run_id:
        raise InvalidField("run_id", named, f"must be the attempt's own run, {grant.run_id}")
    for name in fields:
        if not isinstance(content.get(name, []), list):
            raise InvalidField(name, type(content[name]).__name__, "must be a list")
    forwarded: dict[str, Any] = {"run_id": grant.run_id}
    for name in fields:
        if name in content:
            forwarded[name] = [_only(name, entry) for entry in content[name]]
    for tag in forwarded.get("tags", []):
        key = str(tag.get("key", ""))
        if key in RESERVED_TAGS or key.startswith(RESERVED_PREFIXES):
            raise InvalidField("tags", key, "must not be a tag that the service sets")
    return forwarded


def _only(name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InvalidField(name, entry, "must be a list of objects")
    return {field: entry[field] for field in ENTRY_FIELDS[name] if field in entry}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_object(body: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object. Raises InvalidField."""
    try:
        content = json.loads(body or b"{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidField("body", "bytes", "must be JSON") from None
    if not isinstance(content, dict):
        raise InvalidField("body", type(content).__name__, "must be a JSON object")
    return content
