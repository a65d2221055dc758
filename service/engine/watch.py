"""What streams wait for: changes of jobs, asked of the database once for all who watch."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.domain.errors import Unavailable
from service.store.jobs import JobStore, Pulse

logger = logging.getLogger(__name__)


class Watch:
    """Keeps the newest pulse of every job that somebody watches."""

    def __init__(self, jobs: JobStore, poll_seconds: float) -> None:
        self._jobs, self._poll_seconds = jobs, poll_seconds
        self._watched: Counter[str] = Counter()
        self._pulses: dict[str, Pulse] = {}
        self._changed = asyncio.Condition()
        self.is_closing = False

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.look()
            except Exception as error:  # of whatever kind: all streams wait for this
                logger.warning("streams wait: %s", error, exc_info=not isinstance(error, Unavailable))

    async def look(self) -> None:
        """Look once at all that is watched, and tell of what has changed."""
        if self._watched:
            found = await self._jobs.pulses(list(self._watched))
            async with self._changed:
                if any(self._pulses.get(job_id) != pulse for job_id, pulse in found.items()):
                    self._pulses.update(found)
                    self._changed.notify_all()

    @contextmanager
    def watching(self, job_id: str) -> Iterator[None]:
        """Have a job looked at."""
        self._watched[job_id] += 1
        try:
            yield
        finally:
            self._watched[job_id] -= 1
            if not self._watched[job_id]:
                del self._watched[job_id]
                self._pulses.pop(job_id, None)

    async def next(self, job_id: str, seen: Pulse | None, seconds: float) -> Pulse | None:
        """Wait, so long at most, until a job's pulse is another than `seen`; return what it is then, None if nobody has looked."""
        async with self._changed:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(lambda: self.is_closing or self._pulses.get(job_id, seen) != seen)
            except TimeoutError:
                pass
            return self._pulses.get(job_id, seen)

    async def close(self) -> None:
        """End all streams, so that who reads them turns to another replica, or to this one after its restart."""
        async with self._changed:
            self.is_closing = True
            self._changed.notify_all()
