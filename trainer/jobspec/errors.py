"""Error of a field with an invalid value, and paths of fields."""

from collections.abc import Sequence
from typing import Any

MAX_SHOWN_CHARS = 200


class InvalidField(Exception):  # noqa: N818
    """Invalid value of a field.

    Args:
        field: path of the field in the specification or request, such as `model.name`.
        value: the given value; the message shortens it.
        rule: condition on the value, as text that starts with "must".
    """

    def __init__(self, field: str, value: Any, rule: str) -> None:
        super().__init__(f"{field}: {rule} (got {shorten(value)})")
        self.field, self.value, self.rule = field, value, rule

    def __reduce__(self) -> tuple[type["InvalidField"], tuple[str, Any, str]]:
        return type(self), (self.field, self.value, self.rule)


class NotAllowed(InvalidField):
    """Reference of a specification to something that the operator does not allow."""


def shorten(value: Any) -> str:
    """Return the representation of a value in at most `MAX_SHOWN_CHARS` characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def field_path(location: Sequence[str | int], content: Any) -> str:
    """Convert the location of a pydantic error to a path such as `matrix.norm[1]`.

    The path of the whole content is "". pydantic adds the tag of a union member to the location; tags do not
    exist in the content and are left out.
    """
    path, place = "", content
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        found = (isinstance(place, dict) and part in place) or (
            isinstance(place, list) and isinstance(part, int) and part < len(place)
        )
        if found:
            place = place[part]
        elif not (is_last and isinstance(place, dict)):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
