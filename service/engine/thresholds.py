"""Thresholds of webhooks: what running jobs measure is compared with them."""

from collections.abc import Iterator

from service.domain.jobs import Job
from service.domain.webhooks import Threshold, Webhook
from service.engine.run_files import RunFiles, on_storage
from service.store.webhooks import WebhookStore


class Thresholds:
    """Reads on in the metrics of jobs that somebody has set a threshold for; after a restart anew, and nothing is told twice."""

    def __init__(self, webhooks: WebhookStore, files: RunFiles) -> None:
        self._store, self._files = webhooks, files
        self._webhooks: list[Webhook] = []
        self._places: dict[str, int] = {}

    async def refresh(self) -> None:
        """Read which thresholds there are."""
        self._webhooks = await self._store.with_thresholds()

    async def look(self, job: Job) -> None:
        """Tell of what a job has met since the last look. Raises Unavailable, and then the next look is at the same again."""
        wanted = list(self._wanted(job))
        if not wanted:
            return
        place = self._places.get(job.id, 0)
        while True:
            points, end = await on_storage(self._files.metrics, job, place)
            if end == place:
                break
            for webhook, threshold in wanted:
                met = (
                    p for p in points if threshold.metric in p.metrics and threshold.is_met(p.metrics[threshold.metric])
                )
                if (first := next(met, None)) is not None:
                    await self._store.announce(webhook, job, threshold, first.step, first.metrics[threshold.metric])
            place = end
        self._places[job.id] = place

    def forget(self, job: Job) -> None:
        """Forget a job that has ended."""
        self._places.pop(job.id, None)

    def _wanted(self, job: Job) -> Iterator[tuple[Webhook, Threshold]]:
        for webhook in self._webhooks:
            if webhook.is_about(job):
                for threshold in webhook.thresholds:
                    yield webhook, threshold
