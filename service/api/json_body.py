"""JSON bodies, parsed and written in threads, with a bound on their values."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from fastapi import HTTPException, Request, Response
from pydantic import BaseModel

MAX_VALUES = 20_000
"""Approximate maximum number of values in a body; commas and brackets are counted, also inside strings."""
MARKS = (b",", b"[", b"{")


class JsonRequest(Request):
    """Request whose body has a bounded number of values and is parsed in a thread.

    Parsing and validation take long for many values, however few bytes these are, and hold Python's lock
    meanwhile.
    """

    @classmethod
    def of(cls, request: Request) -> "JsonRequest":
        """Return the request as a `JsonRequest`; what has been read of it stays read."""
        if not isinstance(request, cls):
            request.__class__ = cls
        assert isinstance(request, cls)
        return request

    async def json(self) -> Any:
        """Parse the body.

        Raises json.JSONDecodeError, UnicodeDecodeError, RecursionError, and HTTPException with 422.
        """
        body = await self.body()
        if sum(map(body.count, MARKS)) > MAX_VALUES:
            raise HTTPException(422, f"must have at most {MAX_VALUES:,} values")
        return await in_thread(json.loads, body)


P = ParamSpec("P")
T = TypeVar("T")
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="compute")
"""Threads for parsing and encoding. More would not be faster, as they share the GIL, and would delay the
event loop.
"""


async def respond(make: Callable[[], BaseModel]) -> Response:
    """Create the content of an answer and serialise it as JSON, in a thread."""
    return Response(await in_thread(lambda: make().model_dump_json().encode()), media_type="application/json")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: function(*args, **kwargs))
