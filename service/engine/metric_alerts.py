"""Metric alerts: thresholds of webhooks against metrics of running jobs."""

import time
from dataclasses import dataclass

from service.adapters.run_storage import RunFiles, on_storage
from service.domain.jobs import Job
from service.domain.webhooks import Webhook
from service.store.webhooks import WebhookStore

FORGET_SECONDS = 600.0
"""Time after which the offset of a job that is no longer polled is dropped."""


@dataclass(frozen=True)
class ReadOffset:
    """Offset up to which the metrics of a job were read."""

    byte: int
    """Offset in the job's metrics file."""
    looked_at: float


START = ReadOffset(0, 0.0)


class MetricAlerts:
    """Metric alerts: reads the metrics of jobs incrementally.

    Nothing is reported twice.
    """

    def __init__(self, webhooks: WebhookStore, files: RunFiles) -> None:
        self._store, self._files = webhooks, files
        self._webhooks: list[Webhook] = []
        self._offsets: dict[tuple[str, str], ReadOffset] = {}
        """Read offset of each webhook and job; a webhook that is created later gets all earlier measurements
        of a job.
        """

    async def refresh(self) -> None:
        """Load the thresholds, and drop the offsets of jobs that are no longer read."""
        self._webhooks = await self._store.with_thresholds()
        since = time.monotonic() - FORGET_SECONDS
        self._offsets = {key: place for key, place in self._offsets.items() if place.looked_at > since}

    async def poll(self, job: Job) -> None:
        """Report thresholds that a job has met since the last poll.

        Raises UpstreamUnavailable.
        """
        wanted = [webhook for webhook in self._webhooks if webhook.is_about(job)]
        if not wanted:
            return
        thresholds = [(webhook, threshold) for webhook in wanted for threshold in webhook.thresholds]
        known = [self._offsets.get((webhook.id, job.id), START) for webhook in wanted]
        place = min(place.byte for place in known)  # measurements that were reported are not reported again
        while True:
            points, end = await on_storage(self._files.metrics, job, place)
            if end == place:
                break
            for webhook, threshold in thresholds:
                met = (
                    p
                    for p in points
                    if threshold.metric in p.metrics and threshold.is_met(p.metrics[threshold.metric])
                )
                if (first := next(met, None)) is not None:
                    await self._store.announce(
                        webhook, job, threshold, first.step, first.metrics[threshold.metric]
                    )
            place = end
        now = time.monotonic()
        self._offsets |= {(webhook.id, job.id): ReadOffset(place, now) for webhook in wanted}
