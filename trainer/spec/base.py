"""What all parts of a spec have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of every part of a spec: immutable, and strict about names, types and finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def kind_of(value: Any, default: str | None = None) -> str | None:
    """Tell which member of a union a part of a spec is, by its `name` up to the first colon; `default` where it has none."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return default if name is None else str(name).partition(":")[0]
