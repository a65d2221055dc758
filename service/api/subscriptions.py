"""Subscriptions to changes of jobs and ends of tokens.

One database poll serves all subscribers.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.background import periodic
from service.store.jobs import JobSnapshot, JobStore
from service.store.tokens import TokenStore


class JobFeed:
    """Newest snapshots of subscribed jobs, and ended tokens."""

    def __init__(self, jobs: JobStore, tokens: TokenStore, poll_seconds: float, max_streams: int) -> None:
        self._jobs, self._tokens, self._poll_seconds = jobs, tokens, poll_seconds
        self._max_streams = max_streams
        self._streams: Counter[str] = Counter()
        """Number of open streams by token."""
        self._ended_tokens: set[str] = set()
        self._watched: Counter[str] = Counter()
        self._snapshots: dict[str, JobSnapshot] = {}
        self._changed = asyncio.Condition()
        self.is_closing = False

    async def run(self) -> None:
        """Poll until cancelled."""
        await periodic("poll for streams", self.poll, self._poll_seconds)

    async def poll(self) -> None:
        """Poll all subscribed jobs once, and notify the subscribers of changes."""
        if self._streams:
            asked = set(self._streams)
            # One query for all streams, instead of one per stream.
            ended = asked - await self._tokens.valid_among(asked)
            found = await self._jobs.snapshots(list(self._watched))
            async with self._changed:
                has_news = ended or any(
                    self._snapshots.get(job_id) != snapshot for job_id, snapshot in found.items()
                )
                self._ended_tokens = ended
                # Of some, the last one who watched may have left while they were asked for.
                self._snapshots.update(
                    {job_id: snapshot for job_id, snapshot in found.items() if job_id in self._watched}
                )
                if has_news:
                    self._changed.notify_all()

    def open_stream(self, token_id: str) -> bool:
        """Count a stream of a token, closed by `close_stream`; False at its limit."""
        if self._streams[token_id] >= self._max_streams:
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
    def subscribe(self, job_id: str) -> Iterator[None]:
        """Subscribe to a job."""
        self._watched[job_id] += 1
        try:
            yield
        finally:
            self._watched[job_id] -= 1
            if not self._watched[job_id]:
                del self._watched[job_id]
                self._snapshots.pop(job_id, None)

    async def wait_for_change(
        self, job_id: str, seen: JobSnapshot | None, token_id: str, seconds: float
    ) -> JobSnapshot | None:
        """Wait until the snapshot of a job differs from `seen`; return the snapshot.

        Returns also when the token ends or after a timeout. Returns None if there was no poll.
        """
        async with self._changed:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(
                        lambda: self.is_over(token_id) or self._snapshots.get(job_id, seen) != seen
                    )
            except TimeoutError:
                pass
            return self._snapshots.get(job_id, seen)

    async def close(self) -> None:
        """End all streams.

        Their readers connect to another replica, or after a restart.
        """
        async with self._changed:
            self.is_closing = True
            self._changed.notify_all()
