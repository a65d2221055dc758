"""Metrics for Prometheus: queue and jobs from the database, process timings."""

from collections.abc import Iterable
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.domain.jobs import JobState
from service.store.jobs import JobStore
from service.store.leases import LeaseStore
from service.store.usage import Totals, Usage

DURATION_BUCKETS_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 1_800, 7_200, 43_200)


class Metrics:
    """Metrics of the database, equal at all replicas, and timings of this process."""

    def __init__(self, jobs: JobStore, leases: LeaseStore) -> None:
        self._jobs, self._leases = jobs, leases
        self._registry = CollectorRegistry()
        self.dispatch_seconds = Histogram(
            "syncbn_dispatch_seconds",
            "From the time that an attempt joined the queue, to its submission",
            buckets=DURATION_BUCKETS_SECONDS,
            registry=self._registry,
        )
        self.tick_seconds = Histogram(
            "syncbn_tick_seconds",
            "One round of the dispatcher",
            buckets=DURATION_BUCKETS_SECONDS,
            registry=self._registry,
        )

        self.webhook_messages = Counter(
            "syncbn_webhook_messages",
            "Tries to send a message, by what became of it",
            labelnames=["result"],
            registry=self._registry,
        )

    async def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus. Raises UpstreamUnavailable."""
        totals, seen = await self._jobs.totals(), await self._leases.seconds_since_seen()
        registry = CollectorRegistry()
        registry.register(_Snapshot(totals, seen, datetime.now(UTC)))
        return generate_latest(registry) + generate_latest(self._registry)


class _Snapshot:
    """Metrics of the database at one moment."""

    def __init__(self, totals: Totals, seen: dict[str, float], now: datetime) -> None:
        self._totals, self._seen, self._now = totals, seen, now

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics, for the Prometheus client."""
        states = GaugeMetricFamily("syncbn_jobs", "Jobs by state", labels=["state"])
        for state in JobState:
            states.add_metric([state.value], self._totals.jobs.get(state, 0))
        yield states
        queued = GaugeMetricFamily("syncbn_queued_jobs", "Jobs in the queue by owner", labels=["owner"])
        for owner, count in self._totals.queued.items():
            queued.add_metric([owner], count)
        yield queued
        oldest = self._totals.oldest_queued_at
        age = (self._now - oldest).total_seconds() if oldest else 0.0
        yield GaugeMetricFamily(
            "syncbn_oldest_queued_seconds", "How long the first of the queue has waited", value=age
        )
        for resource in ("gpu", "cpu"):
            what = f"times the {resource.upper()}s that they may have held, by owner"
            name = f"{resource}_seconds"
            ended = CounterMetricFamily(
                f"syncbn_{name}", f"Time that ended attempts have run, {what}", labels=["owner"]
            )
            running = GaugeMetricFamily(
                f"syncbn_running_{name}", f"Time that running attempts have run, {what}", labels=["owner"]
            )
            for owner, used in self._totals.usage.items():
                seconds = getattr(self._totals.ended_usage.get(owner, Usage()), name)
                ended.add_metric([owner], seconds)
                running.add_metric([owner], max(getattr(used, name) - seconds, 0.0))
            yield ended
            yield running
        replicas = GaugeMetricFamily(
            "syncbn_replica_silent_seconds",
            "Seconds since the last heartbeat of a replica",
            labels=["replica"],
        )
        for replica, silent in self._seen.items():
            replicas.add_metric([replica], silent)
        yield replicas
