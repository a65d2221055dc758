"""Named tasks that may outlast the tick that started them."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext


class TaskPool:
    """Tasks by name, at most one of each name and a limited number at work."""

    def __init__(self, max_concurrent: int) -> None:
        self._slots = asyncio.Semaphore(max_concurrent)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._started: dict[str, float] = {}
        """Start time of each task that works, by the monotonic clock."""

    def start(self, name: str, work: Callable[[], Coroutine[None, None, None]], *, limited: bool) -> None:
        """Start a task unless one of this name still runs.

        It waits for a free slot if `limited`.
        """
        # A task that hangs keeps its name, so that the next tick does not start a second one.
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._run(name, work, limited=limited))

    async def wait(self, seconds: float) -> dict[str, BaseException]:
        """Wait for the tasks, and return the errors of those that have ended, by name."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=seconds)
        ended = {name: task for name, task in self._tasks.items() if task.done()}
        for name in ended:
            del self._tasks[name]
        return {
            name: error
            for name, task in ended.items()
            if not task.cancelled() and (error := task.exception()) is not None
        }

    def working_since(self) -> float:
        """Return when the oldest task began to work, by the monotonic clock.

        Infinity if none works.
        """
        return min(self._started.values(), default=math.inf)

    async def close(self) -> None:
        """Cancel all tasks."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(
        self, name: str, work: Callable[[], Coroutine[None, None, None]], *, limited: bool
    ) -> None:
        async with self._slots if limited else nullcontext(), self._at_work(name):
            await work()

    @asynccontextmanager
    async def _at_work(self, name: str) -> AsyncIterator[None]:
        self._started[name] = time.monotonic()
        try:
            yield
        finally:
            del self._started[name]
