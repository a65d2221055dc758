"""Sender of webhook messages, at least once each under one id."""

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from prometheus_client import Counter

from service.adapters.webhook_http import WebhookHttp
from service.domain.errors import UpstreamUnavailable
from service.domain.webhooks import Delivery, Webhook, pause_after, signed_headers
from service.engine.background import periodic
from service.store.webhooks import WebhookStore

logger = logging.getLogger(__name__)
MAX_CONCURRENT_DELIVERIES = 100
"""Maximum number of messages that are sent at the same time, each to another webhook."""
GONE = 410
"""Status by which a receiver ends the delivery."""


class WebhookSender:
    """Sender of due messages; several replicas may run one each."""

    def __init__(
        self,
        webhooks: WebhookStore,
        outgoing: WebhookHttp,
        sent: Counter,
        *,
        poll_seconds: float,
        send_seconds: float,
    ) -> None:
        self._webhooks, self._outgoing, self._sent = webhooks, outgoing, sent
        self._poll_seconds, self._send_seconds = poll_seconds, send_seconds
        self._on_their_way: dict[str, asyncio.Task[None]] = {}
        """Running deliveries by webhook."""

    async def run(self) -> None:
        """Send until cancelled. Interrupted messages are sent again later."""
        try:
            await periodic("sending of messages", self.take, self._pause)
        finally:
            tasks = list(self._on_their_way.values())
            for task in tasks:
                task.cancel()
            # They use connections and the database, which are closed next.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def take(self) -> int:
        """Start sending due messages, one per webhook; return their number."""
        free = MAX_CONCURRENT_DELIVERIES - len(self._on_their_way)
        due = (
            await self._webhooks.claim_due(free, 2 * self._send_seconds, self._on_their_way.keys())
            if free
            else []
        )
        for webhook, delivery in due:
            self._on_their_way[webhook.id] = asyncio.create_task(self._bring(webhook, delivery))
        return len(due)

    async def _pause(self, error: Exception | None) -> None:
        """Wait until more messages may be due."""
        if self._on_their_way and error is None:
            tasks = self._on_their_way.values()
            await asyncio.wait(tasks, timeout=self._poll_seconds, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(self._poll_seconds)

    async def _bring(self, webhook: Webhook, delivery: Delivery) -> None:
        try:
            await self._send(webhook, delivery)
        except Exception as error:  # of any kind: it is sent again when its claim has expired
            is_unexpected = not isinstance(error, UpstreamUnavailable)
            logger.warning(
                "the result of %s could not be stored: %s", delivery.id, error, exc_info=is_unexpected
            )
        finally:
            del self._on_their_way[webhook.id]

    async def _send(self, webhook: Webhook, delivery: Delivery) -> None:
        headers = signed_headers(webhook.secret, delivery.id, datetime.now(UTC), delivery.body)
        status: int | None = None
        try:
            status = await self._outgoing.post(webhook.url, delivery.body, headers)
            answer = f"answered {status}"
        except Exception as error:  # a receiver can fail in every way there is
            answer = f"could not be reached: {type(error).__name__}"
            logger.info("%s to %s: %s", delivery.id, webhook.id, error, extra={"job_id": delivery.job_id})
        is_delivered = status is not None and 200 <= status < 300
        now, attempts = datetime.now(UTC), delivery.attempts + 1
        pause = None if status == GONE else pause_after(attempts)
        has_ended = is_delivered or pause is None
        self._sent.labels("delivered" if is_delivered else "given up" if has_ended else "tried").inc()
        await self._webhooks.record_attempt(
            replace(
                delivery,
                attempts=attempts,
                answer=answer,
                is_delivered=is_delivered,
                ended_at=now if has_ended else None,
                due_at=now + timedelta(seconds=pause or 0),
            )
        )
