"""Background tasks of the service, and loops that repeat a function."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine

from service.domain.errors import UpstreamUnavailable

logger = logging.getLogger(__name__)


async def periodic(
    what: str,
    work: Callable[[], Awaitable[object]],
    pause: float | Callable[[Exception | None], Awaitable[None]],
) -> None:
    """Call `work` until cancelled. Errors are logged and do not end the loop.

    Args:
        what: the work, for log lines.
        work: called without arguments.
        pause: seconds between calls, or a function that is awaited between them with the error of the last
            call, or None.
    """
    while True:
        error = None
        try:
            await work()
        except Exception as caught:  # of any kind: nobody else would do this work
            error = caught
            is_unexpected = not isinstance(error, UpstreamUnavailable)
            logger.warning("%s failed, to be retried: %s", what, error, exc_info=is_unexpected)
        if callable(pause):
            await pause(error)
        else:
            await asyncio.sleep(pause)


class Background:
    """Long-running tasks, none of which ends unless it fails."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task; its error is logged when it ends."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_log_end)
        self._tasks.append(task)
        return task

    def ended(self) -> list[str]:
        """Names of the tasks that have ended."""
        return [task.get_name() for task in self._tasks if task.done()]

    async def close(self) -> None:
        """Cancel all tasks in order; a failed one does not prevent the others from ending."""
        for task in self._tasks:
            task.cancel()
            await asyncio.wait([task])


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.critical("%s has ended", task.get_name(), exc_info=error)
