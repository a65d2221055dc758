"""Routes for webhooks."""

from datetime import UTC, datetime

from fastapi import APIRouter

from service.api.auth import Reader, Submitter
from service.api.dependencies import WebhookClient, WebhookId, Webhooks
from service.api.idempotency import Route
from service.api.pagination import PageSize, PageToken, decode_page_token, encode_page_token
from service.api.schemas.webhooks import (
    DeliveryList,
    DeliveryView,
    MadeWebhook,
    MakeWebhook,
    WebhookList,
    WebhookView,
)
from service.domain.jobs import new_id
from service.domain.webhooks import Webhook, new_webhook_secret

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=Route)


@router.post("", status_code=201)
async def make_webhook(
    body: MakeWebhook, caller: Submitter, webhook_http: WebhookClient, webhook_store: Webhooks
) -> MadeWebhook:
    """Create a webhook for signed messages about the caller's jobs.

    Messages follow Standard Webhooks.
    """
    await webhook_http.check(str(body.url))
    webhook = Webhook(
        id=new_id("webhook"),
        owner=caller.owner,
        url=str(body.url),
        secret=new_webhook_secret(),
        states=tuple(dict.fromkeys(body.states)),
        thresholds=tuple(dict.fromkeys(body.thresholds)),
        tag=body.tag,
        created_at=datetime.now(UTC),
    )
    await webhook_store.add(webhook, caller)
    return MadeWebhook(secret=webhook.secret, **WebhookView.model_validate(webhook).model_dump())


@router.get("")
async def list_webhooks(
    caller: Reader, webhook_store: Webhooks, page_size: PageSize = 50, page_token: PageToken = None
) -> WebhookList:
    """List the webhooks of the caller (scope admin: all), newest first."""
    webhooks, more = await webhook_store.page(page_size, decode_page_token(page_token), caller.sees_only)
    return WebhookList(
        webhooks=[WebhookView.model_validate(webhook) for webhook in webhooks],
        next_page_token=encode_page_token(more),
    )


@router.get("/{webhook_id}")
async def show_webhook(webhook_id: WebhookId, caller: Reader, webhook_store: Webhooks) -> WebhookView:
    """Show a webhook."""
    return WebhookView.model_validate(await webhook_store.get(webhook_id, caller.sees_only))


@router.delete("/{webhook_id}", status_code=204)
async def delete_webhook(webhook_id: WebhookId, caller: Submitter, webhook_store: Webhooks) -> None:
    """Delete a webhook and its messages, including unsent ones."""
    await webhook_store.delete(await webhook_store.get(webhook_id, caller.sees_only), caller)


@router.get("/{webhook_id}/deliveries")
async def list_deliveries(
    webhook_id: WebhookId,
    caller: Reader,
    webhook_store: Webhooks,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> DeliveryList:
    """List the messages of a webhook and their results, newest first."""
    webhook = await webhook_store.get(webhook_id, caller.sees_only)
    found, more = await webhook_store.deliveries_of(webhook.id, page_size, decode_page_token(page_token))
    return DeliveryList(
        deliveries=[DeliveryView.model_validate(delivery) for delivery in found],
        next_page_token=encode_page_token(more),
    )
