"""Base class of all parts of a spec."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

DEEPEST = 32
"""Levels of lists and objects within an argument."""
MAX_ARGUMENT_VALUES = 10_000
"""Numbers, texts, lists and objects of all arguments together, the keys of objects included."""


class FrozenModel(BaseModel):
    """Base of every part of a spec: immutable, and strict about names, types and finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _readable_again(arguments: Any) -> Any:
    """Refuse what can be read from a request once, but not from the database, or from a file, again; and what is too much.

    This comes before pydantic's own validation, which takes long for many values.
    """
    left: list[tuple[Any, int]] = [(arguments, 0)]
    count = 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > MAX_ARGUMENT_VALUES or len(left) > MAX_ARGUMENT_VALUES:
            raise ValueError(f"must have at most {MAX_ARGUMENT_VALUES:,} values in all")
        if depth > DEEPEST:
            raise ValueError(f"must have at most {DEEPEST} levels of lists and objects")
        if isinstance(value, str) and any(
            character == "\0" or "\ud800" <= character <= "\udfff" for character in value
        ):
            raise ValueError(f"must be text without NUL characters and halves of surrogate pairs (got {value!r})")
        if isinstance(value, dict):
            left += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            left += [(part, depth + 1) for part in value]
    return arguments


Arguments = Annotated[dict[str, JsonValue], BeforeValidator(_readable_again)]
"""Keyword arguments of something that the spec names."""


def kind_of(value: Any, default: str | None = None) -> str | None:
    """Return the union member of a part of a spec: its `name` up to the first colon, or `default` without one."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return default if name is None else str(name).partition(":")[0]
