"""Bodies of forms, and values that are written as YAML in them."""

from typing import Any, TypeVar
from urllib.parse import parse_qs

import yaml
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from service.api.json_body import in_thread
from trainer.jobspec import InvalidField, JobSpec, parse_yaml

M = TypeVar("M", bound=BaseModel)
MAX_FIELDS = 200


class Form(dict[str, list[str]]):
    """Fields of a form with their values."""

    def text(self, name: str) -> str:
        """Return the value of a field without spaces around it; empty if it is missing."""
        return self.get(name, [""])[0].strip()


async def read_form(request: Request) -> Form:
    """Read the body of a form. Raises HTTPException with 413 or 422."""
    body = await request.body()
    if len(body) > request.app.max_body_size:
        raise HTTPException(413)
    try:
        return Form(parse_qs(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS))
    except ValueError as error:  # includes UnicodeDecodeError
        raise HTTPException(422, str(error)) from error


async def read_mapping(field: str, text: str) -> dict[str, Any]:
    """Parse a field that holds a YAML mapping, or nothing. Raises InvalidField."""
    try:
        content = await in_thread(parse_yaml, text)
    except ValueError as error:
        raise InvalidField(field, text[:100], f"must be valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidField(field, text[:100], "must be a mapping, such as `optimizer.lr: 0.1`")
    return content


def validated(model: type[M], content: dict[str, Any]) -> M:
    """Validate the content of a form. Raises RequestValidationError."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = [each | {"loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(errors, body=content) from error


def as_yaml(content: Any) -> str:
    """Return values as YAML that is pleasant to read and edit."""
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100).strip()


def spec_yaml(spec: JobSpec) -> str:
    """Return a spec as YAML without default values, except for compared fields."""
    changed = spec.model_dump(mode="json", exclude_defaults=True)
    named = {
        "norm": spec.norm.value,
        "model": {"name": spec.model.name} | changed.pop("model", {}),
        "data": {"name": spec.data.name} | changed.pop("data", {}),
    }
    return as_yaml(named | changed)
