"""Subscriptions to changes of jobs and ends of tokens.

One database poll serves all subscribers.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.domain.errors import UpstreamUnavailable
from service.store.jobs import JobSnapshot, JobStore
from service.store.tokens import TokenStore

logger = logging.getLogger(__name__)


class JobFeed:
    """Newest snapshots of subscribed jobs, and ended tokens."""

    def __init__(self, jobs: JobStore, tokens: TokenStore, poll_seconds: float, most_streams: int) -> None:
        self._jobs, self._tokens, self._poll_seconds = jobs, tokens, poll_seconds
        self._most_streams = most_streams
        self._streams: Counter[str] = Counter()
        """By token."""
        self._ended_tokens: set[str] = set()
        self._watched: Counter[str] = Counter()
        self._pulses: dict[str, JobSnapshot] = {}
        self._changed = asyncio.Condition()
        self.is_closing = False

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self.look()
            except Exception as error:  # of whatever kind: all streams wait for this
                logger.warning("streams wait: %s", error, exc_info=not isinstance(error, UpstreamUnavailable))

    async def look(self) -> None:
        """Poll all subscribed jobs once, and notify the subscribers of changes."""
        if self._streams:
            asked = set(self._streams)
            ended = asked - await self._tokens.valid_among(asked)
            found = await self._jobs.snapshots(list(self._watched))
            async with self._changed:
                has_news = ended or any(self._pulses.get(job_id) != pulse for job_id, pulse in found.items())
                self._ended_tokens = ended
                # Of some, the last one who watched may have left while they were asked for.
                self._pulses.update({job_id: pulse for job_id, pulse in found.items() if job_id in self._watched})
                if has_news:
                    self._changed.notify_all()

    def open_stream(self, token_id: str) -> bool:
        """Count a stream of a token, closed by `close_stream`; False at its limit."""
        if self._streams[token_id] >= self._most_streams:
            return False
        self._streams[token_id] += 1
        return True

    def close_stream(self, token_id: str) -> None:
        """Uncount a stream."""
        self._streams[token_id] -= 1
        if not self._streams[token_id]:
            del self._streams[token_id]

    def is_over(self, token_id: str) -> bool:
        """Return whether streams of a token must end: it is invalid, or the service stops."""
        return self.is_closing or token_id in self._ended_tokens

    @contextmanager
    def watching(self, job_id: str) -> Iterator[None]:
        """Subscribe to a job."""
        self._watched[job_id] += 1
        try:
            yield
        finally:
            self._watched[job_id] -= 1
            if not self._watched[job_id]:
                del self._watched[job_id]
                self._pulses.pop(job_id, None)

    async def next(self, job_id: str, seen: JobSnapshot | None, token_id: str, seconds: float) -> JobSnapshot | None:
        """Wait until the snapshot of a job differs from `seen`, the token ends, or a timeout.

        Returns what the pulse is then, None if nobody has looked.
        """
        async with self._changed:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(
                        lambda: self.is_over(token_id) or self._pulses.get(job_id, seen) != seen
                    )
            except TimeoutError:
                pass
            return self._pulses.get(job_id, seen)

    async def close(self) -> None:
        """End all streams, so that their readers connect to another replica or after a restart."""
        async with self._changed:
            self.is_closing = True
            self._changed.notify_all()
