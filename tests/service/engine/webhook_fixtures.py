"""Webhooks for tests."""

from datetime import UTC, datetime

from service.domain.access import Caller, Scope
from service.domain.jobs import JobState, new_id
from service.domain.webhooks import Webhook, new_webhook_secret

ADMIN = Caller("admin", (Scope.ADMIN,), "token-1")


async def make(webhooks, url, **changes):
    values = {"owner": "admin", "states": (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)}
    hook = Webhook(
        id=new_id("webhook"),
        url=url,
        secret=new_webhook_secret(),
        created_at=datetime.now(UTC),
        **(values | changes),
    )
    await webhooks.add(hook, ADMIN)
    return hook


async def only_message(webhooks, hook):
    (found,), _ = await webhooks.deliveries_of(hook.id, 10, None)
    return found
