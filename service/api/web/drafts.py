"""Drafts of submissions: read from the form or from YAML, checked, submitted."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError

from service.adapters.ray import RayJobs
from service.api import problems
from service.api.json_body import in_thread
from service.api.routes.validation import validate_comparison, validate_job
from service.api.schemas import FieldError, Problem, SubmitComparison, SubmitJob, Validation
from service.api.submission_checks import SubmissionChecks
from service.api.web.filters import plain
from service.api.web.forms import Form, as_yaml, read_mapping, validated
from service.api.web.spec_form import Field, read_spec, read_value, sections
from service.domain.access import Caller
from service.domain.comparisons import expand
from service.domain.errors import ServiceError
from service.domain.estimates import estimate_seconds
from service.domain.jobs import Job
from trainer.jobspec import InvalidField, JobSpec, parse_yaml

OPTIONS = ("name", "metric", "target", "tags", "priority")
"""Fields of a request that have a field of their own in the form; the rest is kept as YAML."""
SPARE_ROWS = 2
MAX_ROWS = 32
Errors = (HTTPException, ServiceError, InvalidField, RequestValidationError)


@dataclass(frozen=True)
class Draft:
    """Body of a request for a job, or with a matrix or variants for a comparison."""

    content: Mapping[str, Any]

    @property
    def is_comparison(self) -> bool:
        """Whether the draft is one of a comparison."""
        return bool(self.content.get("matrix") or self.content.get("variants"))

    @property
    def spec(self) -> Mapping[str, Any]:
        """Spec, as far as it is a mapping."""
        spec = self.content.get("spec")
        return spec if isinstance(spec, Mapping) else {}

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Paths of the matrix and their values as text, and some empty ones."""
        matrix = self.content.get("matrix")
        known = matrix.items() if isinstance(matrix, Mapping) else ()
        rows = [(path, _listed(values)) for path, values in known]
        return rows + [("", "")] * SPARE_ROWS

    @property
    def rest(self) -> str:
        """Fields that the form does not have, as YAML; empty without any."""
        rest = {
            name: value for name, value in self.content.items() if name not in (*OPTIONS, "spec", "matrix")
        }
        return as_yaml(rest) if rest else ""

    def option(self, name: str) -> str:
        """Return an option as text; empty if it is not set."""
        value = self.content.get(name)
        return (
            "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else plain(value)
        )

    def sections(self) -> dict[str, list[Field]]:
        """Return the fields of the spec, by section."""
        return sections(self.spec)

    def as_yaml(self) -> str:
        """Return the draft as YAML."""
        return as_yaml(dict(self.content))

    def request(self) -> SubmitJob | SubmitComparison:
        """Validate the draft. Raises RequestValidationError."""
        if self.is_comparison:
            return validated(SubmitComparison, dict(self.content))
        return validated(SubmitJob, dict(self.content))


@dataclass(frozen=True)
class Check:
    """Result of the check of a draft."""

    errors: Sequence[FieldError] = ()
    found: Validation | None = None
    seconds_per_run: float | None = None
    """Median over the runs; None if no similar job has ended."""
    seconds_in_all: float | None = None
    messages: dict[str, str] = field(default_factory=dict)
    """Messages by the name of the field of the form."""

    @classmethod
    def failed(cls, request: Request, error: Exception) -> "Check":
        """Return the result for an error."""
        problem = Problem.model_validate_json(bytes(problems.answer_of(request, error).body))
        errors = problem.errors or [FieldError(field="", message=problem.detail)]
        # The form has a field for a list as a whole.
        messages = {each.field.partition("[")[0]: each.message for each in errors}
        return cls(errors=errors, messages=messages)


async def read_draft(form: Form) -> Draft:
    """Read a draft from the form, or from its YAML. Raises InvalidField."""
    if form.text("view") == "yaml":
        return Draft(await read_mapping("yaml", form.text("yaml")))
    content: dict[str, Any] = {}
    for name in OPTIONS:
        if text := form.text(name):
            content[name] = _option(name, text)
    content["spec"] = read_spec({name: values[0] for name, values in form.items()})
    if matrix := _matrix(form):
        content["matrix"] = matrix
    return Draft(content | await read_mapping("rest", form.text("rest")))


async def check_draft(
    draft: Draft, caller: Caller, checks: SubmissionChecks, ray: RayJobs, ended: Sequence[Job]
) -> Check:
    """Check a draft as the API does. Raises the errors that the API answers with."""
    body = draft.request()
    if isinstance(body, SubmitComparison):
        found = await validate_comparison(body, caller, checks, ray)
        specs = [spec for _, spec in await in_thread(expand, body.spec, body.matrix, body.variants)]
    else:
        found, specs = await validate_job(body, caller, checks, ray), [body.spec]
    per_run, in_all = await in_thread(_estimate, specs, ended)
    return Check(found=found, seconds_per_run=per_run, seconds_in_all=in_all)


def _estimate(specs: Sequence[JobSpec], ended: Sequence[Job]) -> tuple[float | None, float | None]:
    """Return the mean time of a run and that of all; None where one is not known."""
    seconds = [estimate_seconds(spec, ended) for spec in specs]
    known = [each for each in seconds if each is not None]
    if len(known) < len(seconds):
        return None, None
    return math.fsum(known) / len(known), math.fsum(known)


def _matrix(form: Form) -> dict[str, list[Any]]:
    matrix = {}
    for row in range(MAX_ROWS + SPARE_ROWS):
        path, values = form.text(f"matrix.{row}.path"), form.text(f"matrix.{row}.values")
        if not path and not values:
            continue
        if not path:
            raise InvalidField(f"matrix.{row}.path", path, f"must be the path whose values are {values}")
        if path in matrix:
            raise InvalidField(f"matrix.{row}.path", path, "must be a path that no other row has")
        name = f"matrix.{row}.values"
        read = read_value(name, f"[{values}]")
        if not isinstance(read, list) or not read:
            raise InvalidField(name, values, "must be values, separated by commas")
        matrix[path] = read
    return matrix


def _option(name: str, text: str) -> Any:
    if name == "tags":
        return [tag.strip() for tag in text.split(",") if tag.strip()]
    return text if name in ("name", "metric") else read_value(name, text)


def _listed(values: Any) -> str:
    """Return values as in a row of the matrix: without brackets where that is clear."""
    if not isinstance(values, list):
        return plain(values)
    text = ", ".join(plain(each) for each in values)
    try:
        is_clear = parse_yaml(f"[{text}]") == values
    except ValueError:
        is_clear = False
    return text if is_clear else json.dumps(values)[1:-1]
