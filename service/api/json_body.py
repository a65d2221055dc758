"""Bodies of JSON, read in a thread and limited in what they hold."""

import json
from typing import Any

from fastapi import HTTPException, Request

from service.api.compute import in_thread

MAX_VALUES = 20_000
"""Numbers, texts, lists and objects of a body, and the keys of objects."""
MAX_DEPTH = 40
"""Levels of lists and objects."""


class JsonRequest(Request):
    """A request whose body is parsed beside the event loop, and refused before anything is made of it if it holds too much."""

    @classmethod
    def of(cls, request: Request) -> "JsonRequest":
        """Return the request as one of these; what has been read of it stays read."""
        if not isinstance(request, cls):
            request.__class__ = cls
        assert isinstance(request, cls)
        return request

    async def json(self) -> Any:
        """Parse the body. Raises json.JSONDecodeError, UnicodeDecodeError, RecursionError, and HTTPException with 422."""
        return await in_thread(_parse, await self.body())


def _parse(body: bytes) -> Any:
    content = json.loads(body)
    left: list[tuple[Any, int]] = [(content, 0)]
    count = 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise HTTPException(422, f"must have at most {MAX_DEPTH} levels of lists and objects")
        if isinstance(value, dict):
            count += len(value)
            left += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list):
            left += [(part, depth + 1) for part in value]
        if count + len(left) > MAX_VALUES:
            raise HTTPException(422, f"must have at most {MAX_VALUES:,} values, keys included")
    return content
