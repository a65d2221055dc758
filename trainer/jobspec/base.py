"""Base class of all parts of a job specification."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue

MAX_ARGUMENT_DEPTH = 32
"""Maximum nesting of lists and objects within an argument."""
MAX_ARGUMENT_VALUES = 10_000
"""Maximum number of values of all arguments together: numbers, texts, lists, objects and keys of objects."""


class FrozenModel(BaseModel):
    """Immutable part of a specification, strict about names, types and finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileModel(FrozenModel):
    """Content of a file that another version may have written.

    Unknown fields are ignored, and a new field needs a default.
    """

    # The schema describes what this version writes.
    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": False})


def _readable_again(arguments: Any) -> Any:
    """Reject arguments that are too large or do not survive storage.

    Texts with NUL characters or lone surrogates can be read from a request, but not from the database or a
    file. This check runs before pydantic's own validation, which is slow for many values.
    """
    left: list[tuple[Any, int]] = [(arguments, 0)]
    count = 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > MAX_ARGUMENT_VALUES or len(left) > MAX_ARGUMENT_VALUES:
            raise ValueError(f"must have at most {MAX_ARGUMENT_VALUES:,} values in all")
        if depth > MAX_ARGUMENT_DEPTH:
            raise ValueError(f"must have at most {MAX_ARGUMENT_DEPTH} levels of lists and objects")
        if isinstance(value, str) and any(
            character == "\0" or "\ud800" <= character <= "\udfff" for character in value
        ):
            raise ValueError(
                f"must be text without NUL characters and halves of surrogate pairs (got {value!r})"
            )
        if isinstance(value, dict):
            left += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            left += [(part, depth + 1) for part in value]
    return arguments


Arguments = Annotated[dict[str, JsonValue], BeforeValidator(_readable_again)]
"""Keyword arguments of a model builder or an optimizer."""


def kind_of(value: Any, default: str | None = None) -> str | None:
    """Return the union member of a part of a specification.

    This is its `name` up to the first colon, or `default` if it has none.
    """
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return default if name is None else str(name).partition(":")[0]
