"""Webhooks and their messages in the database.

A message is stored in the transaction of the change that it reports.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.access import Caller
from service.domain.errors import Conflict, NotFound
from service.domain.jobs import Job, JobState, new_id
from service.domain.webhooks import Delivery, Threshold, Webhook, write_message
from service.store.audit import record
from service.store.database import Database, advisory_lock, read_page
from service.store.tables import deliveries, jobs, webhooks

COLUMNS = [webhooks.c[field.name] for field in fields(Webhook)]
DELIVERY_COLUMNS = [deliveries.c[field.name] for field in fields(Delivery)]
MAX_WEBHOOKS_PER_OWNER = 20
COUNT_LOCK = 5_021_505
"""Advisory lock of counting an owner's webhooks and adding one."""


class WebhookStore:
    """Webhooks and messages in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, webhook: Webhook, maker: Caller) -> None:
        """Create a webhook. Raises Conflict if its owner has too many."""
        row = asdict(webhook) | {
            "states": [state.value for state in webhook.states],
            "thresholds": [threshold.model_dump() for threshold in webhook.thresholds],
            "has_thresholds": bool(webhook.thresholds),
        }
        count = select(func.count()).where(webhooks.c.owner == webhook.owner)
        async with self._database.write() as connection:
            # Otherwise concurrent requests could each count the others' webhooks as absent.
            await advisory_lock(connection, COUNT_LOCK)
            if (await connection.execute(count)).scalar_one() >= MAX_WEBHOOKS_PER_OWNER:
                raise Conflict(
                    f"{webhook.owner} has {MAX_WEBHOOKS_PER_OWNER} webhooks, the most there may be; delete "
                    "one before"
                )
            await connection.execute(insert(webhooks).values(**row))
            await record(
                connection, maker, "webhook.create", webhook.id, f"to {webhook.host}", webhook.created_at
            )

    async def get(self, webhook_id: str, owner: str | None = None) -> Webhook:
        """Return a webhook. Raises NotFound, also if it is not `owner`'s."""
        query = select(*COLUMNS).where(webhooks.c.id == webhook_id)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None or owner not in (None, row.owner):
            raise NotFound(f"there is no webhook {webhook_id!r}")
        return _webhook(row)

    async def page(
        self, size: int, before: int | None, owner: str | None
    ) -> tuple[list[Webhook], int | None]:
        """Return a page of webhooks, newest first, and the place of the next page."""
        query = select(*COLUMNS)
        query = query if owner is None else query.where(webhooks.c.owner == owner)
        async with self._database.read() as connection:
            rows, more = await read_page(connection, query, webhooks.c.sequence, size, before)
        return [_webhook(row) for row in rows], more

    async def delete(self, webhook: Webhook, actor: Caller) -> None:
        """Delete a webhook and its messages, including unsent ones. Raises NotFound."""
        # Locked first: a message that is being stored just now is waited for, and who comes later finds no
        # webhook any more.
        row = select(webhooks.c.id).where(webhooks.c.id == webhook.id).with_for_update()
        async with self._database.write() as connection:
            if (await connection.execute(row)).one_or_none() is None:
                raise NotFound(f"there is no webhook {webhook.id!r}")
            await connection.execute(delete(deliveries).where(deliveries.c.webhook_id == webhook.id))
            await connection.execute(delete(webhooks).where(webhooks.c.id == webhook.id))
            await record(
                connection, actor, "webhook.delete", webhook.id, f"to {webhook.host}", datetime.now(UTC)
            )

    async def with_thresholds(self) -> list[Webhook]:
        """Read the webhooks with thresholds."""
        query = select(*COLUMNS).where(webhooks.c.has_thresholds)
        async with self._database.read() as connection:
            return [_webhook(row) for row in (await connection.execute(query)).all()]

    async def announce(self, webhook: Webhook, job: Job, met: Threshold, step: int, value: float) -> None:
        """Store a message about a threshold, once per job, if the webhook still exists."""
        now = datetime.now(UTC)
        known = select(deliveries.c.id).where(
            deliveries.c.webhook_id == webhook.id,
            deliveries.c.job_id == job.id,
            deliveries.c.about == str(met),
        )
        # The row stays locked until the commit, so that a concurrent deletion waits.
        is_there = _kept(select(webhooks.c.id).where(webhooks.c.id == webhook.id))
        async with self._database.write() as connection:
            if (await connection.execute(is_there)).one_or_none() is None:
                return
            if (await connection.execute(known)).one_or_none() is None:
                await _send(
                    connection, webhook, job, str(met), write_message(job, now, met, step, value), now
                )

    async def deliveries_of(
        self, webhook_id: str, size: int, before: int | None
    ) -> tuple[list[Delivery], int | None]:
        """Return a page of a webhook's messages, newest first.

        Also returns the position of the next page.
        """
        query = select(*DELIVERY_COLUMNS).where(deliveries.c.webhook_id == webhook_id)
        async with self._database.read() as connection:
            rows, more = await read_page(connection, query, deliveries.c.sequence, size, before)
        return [_delivery(row) for row in rows], more

    async def claim_due(
        self, most: int, seconds: float, busy: Collection[str] = ()
    ) -> list[tuple[Webhook, Delivery]]:
        """Take due messages, oldest first, and reserve them for some seconds.

        Of each webhook it is one at most, and none of those that are `busy`: so a slow receiver keeps only
        its own waiting.
        """
        now = datetime.now(UTC)
        is_due = (deliveries.c.ended_at.is_(None), deliveries.c.due_at <= now)
        of_one = select(deliveries.c.id).where(deliveries.c.webhook_id == webhooks.c.id, *is_due)
        of_each = select(of_one.order_by(deliveries.c.due_at).limit(1).scalar_subquery()).where(
            webhooks.c.id.not_in(busy)
        )
        query = select(*DELIVERY_COLUMNS).where(deliveries.c.id.in_(of_each), *is_due)
        query = query.order_by(deliveries.c.due_at)
        async with (
            self._database.read() as connection
        ):  # most of the time there is none, and nothing to write
            for look in (select(deliveries.c.id).where(*is_due), query):
                if (await connection.execute(look.limit(1))).one_or_none() is None:
                    return []
        async with self._database.write() as connection:
            rows = (await connection.execute(query.limit(most).with_for_update(skip_locked=True))).all()
            due = [_delivery(row) for row in rows]
            later = {"due_at": now + timedelta(seconds=seconds)}
            ids = [delivery.id for delivery in due]
            await connection.execute(update(deliveries).where(deliveries.c.id.in_(ids)).values(**later))
            wanted = select(*COLUMNS).where(webhooks.c.id.in_([delivery.webhook_id for delivery in due]))
            found = {row.id: _webhook(row) for row in (await connection.execute(wanted)).all()}
        return [(found[delivery.webhook_id], delivery) for delivery in due]

    async def record_attempt(self, delivery: Delivery) -> None:
        """Store the result of a try, unless another sender has tried since."""
        is_as_it_was = (deliveries.c.ended_at.is_(None), deliveries.c.attempts == delivery.attempts - 1)
        query = update(deliveries).where(deliveries.c.id == delivery.id, *is_as_it_was)
        values = {
            name: getattr(delivery, name)
            for name in ("due_at", "attempts", "ended_at", "is_delivered", "answer")
        }
        async with self._database.write() as connection:
            await connection.execute(query.values(**values))

    async def delete_ended(self, time: datetime, most: int) -> int:
        """Delete messages that ended before `time`, about jobs that did too.

        Returns their number.

        While a job runs, they prevent repeated messages about it.
        """
        old_jobs = select(jobs.c.id).where(jobs.c.ended_at < time)
        old = (
            select(deliveries.c.sequence)
            .where(deliveries.c.ended_at < time, deliveries.c.job_id.in_(old_jobs))
            .limit(most)
        )
        async with self._database.write() as connection:
            return (
                await connection.execute(delete(deliveries).where(deliveries.c.sequence.in_(old)))
            ).rowcount


async def announce_end(connection: AsyncConnection, job: Job, at: datetime) -> None:
    """Store a message for every webhook that matches the end of a job.

    The transaction is the one that ends the job.
    """
    rows = (await connection.execute(_kept(select(*COLUMNS).where(webhooks.c.owner == job.owner)))).all()
    for webhook in map(_webhook, rows):
        if job.state in webhook.states and webhook.is_about(job):
            await _send(connection, webhook, job, job.state.value, write_message(job, at), at)


async def delete_deliveries(connection: AsyncConnection, job_ids: Sequence[str]) -> None:
    """Delete messages about jobs, in the transaction that deletes the jobs."""
    await connection.execute(delete(deliveries).where(deliveries.c.job_id.in_(job_ids)))


def _kept(query: Select[Any]) -> Select[Any]:
    """Lock the webhooks found until their messages are stored."""
    return query.with_for_update(read=True, key_share=True)


async def _send(
    connection: AsyncConnection, webhook: Webhook, job: Job, about: str, body: str, at: datetime
) -> None:
    delivery = Delivery(
        id=new_id("message"),
        webhook_id=webhook.id,
        job_id=job.id,
        about=about,
        body=body,
        created_at=at,
        due_at=at,
    )
    await connection.execute(insert(deliveries).values(**asdict(delivery)))


def _webhook(row: Any) -> Webhook:
    values = {field.name: getattr(row, field.name) for field in fields(Webhook)}
    values["states"] = tuple(JobState(state) for state in row.states)
    values["thresholds"] = tuple(Threshold(**threshold) for threshold in row.thresholds)
    return Webhook(**values)


def _delivery(row: Any) -> Delivery:
    return Delivery(**{field.name: getattr(row, field.name) for field in fields(Delivery)})
