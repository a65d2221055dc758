"""Background tasks of the service, started and stopped together."""

import asyncio
import logging
from collections.abc import Coroutine

logger = logging.getLogger(__name__)


class Background:
    """Long-running tasks, none of which ends unless it fails."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task; its error is logged when it ends."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_tell_end)
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


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.critical("%s has ended", task.get_name(), exc_info=error)
