"""Schemas of errors."""

from typing import Any

from pydantic import BaseModel, Field


class FieldError(BaseModel):
    """Invalid field of a request."""

    field: str = Field(description="path into the body or name of the parameter")
    value: Any = Field(None, description="what was sent")
    takes: str


class Problem(BaseModel):
    """Problem details (RFC 9457), sent as `application/problem+json`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []
