"""Paths of errors in a spec."""

from collections.abc import Sequence
from typing import Any


def field_path(location: Sequence[str | int], content: Any) -> str:
    """Write a pydantic error's location as a path into what the user wrote, such as `matrix.norm[1]`; "" for all of it.

    pydantic puts the tag of a chosen alternative into the location; such a part does not exist in the content, and is left out.
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
