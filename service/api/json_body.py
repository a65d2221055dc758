"""Bodies of JSON, read in a thread and limited in what they hold."""

import json
from typing import Any

from fastapi import HTTPException, Request

from service.api.compute import in_thread

MAX_VALUES = 20_000
"""Numbers, texts, lists and objects of a body, about: commas and brackets are counted, those within texts included."""
MARKS = (b",", b"[", b"{")


class JsonRequest(Request):
    """A request whose body is refused unparsed if it holds too much, and is parsed beside the event loop otherwise.

    Parsing and validation take long for many values, however few bytes these are, and hold Python's lock meanwhile.
    """

    @classmethod
    def of(cls, request: Request) -> "JsonRequest":
        """Return the request as one of these; what has been read of it stays read."""
        if not isinstance(request, cls):
            request.__class__ = cls
        assert isinstance(request, cls)
        return request

    async def json(self) -> Any:
        """Parse the body. Raises json.JSONDecodeError, UnicodeDecodeError, RecursionError, and HTTPException with 422."""
        body = await self.body()
        if sum(map(body.count, MARKS)) > MAX_VALUES:
            raise HTTPException(422, f"must have at most {MAX_VALUES:,} values")
        return await in_thread(json.loads, body)
