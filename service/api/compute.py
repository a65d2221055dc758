"""Computations of requests that take longer than a moment, in threads, so that other requests are answered meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from fastapi import Response
from pydantic import BaseModel

P = ParamSpec("P")
T = TypeVar("T")
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="compute")
"""More would not compute faster, as they share Python's lock, and would keep the event loop waiting for longer."""


async def respond(make: Callable[[], BaseModel]) -> Response:
    """Make an answer's content and write it as JSON in one of the threads."""
    return Response(await in_thread(lambda: make().model_dump_json().encode()), media_type="application/json")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in one of the threads."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: function(*args, **kwargs))
