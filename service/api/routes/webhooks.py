"""Routes for webhooks."""

from datetime import UTC, datetime

from fastapi import APIRouter

from service.api.auth import Reader, Submitter
from service.api.dependencies import GivenComponents
from service.api.idempotency import Route
from service.api.pagination import PageSize, PageToken, place_of, token_of
from service.api.path_params import WebhookId
from service.api.schemas.webhooks import DeliveryList, DeliveryView, MadeWebhook, MakeWebhook, WebhookList, WebhookView
from service.domain.jobs import new_id
from service.domain.webhooks import Webhook, new_webhook_secret

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], route_class=Route)


@router.post("", status_code=201)
async def make_webhook(body: MakeWebhook, caller: Submitter, components: GivenComponents) -> MadeWebhook:
    """Create a webhook for signed messages (Standard Webhooks) about the caller's jobs."""
    await components.outgoing.check(str(body.url))
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
    await components.webhooks.add(webhook, caller)
    return MadeWebhook(secret=webhook.secret, **WebhookView.of(webhook).model_dump())


@router.get("")
async def list_webhooks(
    caller: Reader, components: GivenComponents, page_size: PageSize = 50, page_token: PageToken = None
) -> WebhookList:
    """List the webhooks of the caller (scope admin: all), newest first."""
    webhooks, more = await components.webhooks.page(page_size, place_of(page_token), caller.sees_only)
    return WebhookList(webhooks=[WebhookView.of(webhook) for webhook in webhooks], next_page_token=token_of(more))


@router.get("/{webhook_id}")
async def show_webhook(webhook_id: WebhookId, caller: Reader, components: GivenComponents) -> WebhookView:
    """Show a webhook."""
    return WebhookView.of(await components.webhooks.get(webhook_id, caller.sees_only))


@router.delete("/{webhook_id}", status_code=204)
async def delete_webhook(webhook_id: WebhookId, caller: Submitter, components: GivenComponents) -> None:
    """Delete a webhook and its messages, including unsent ones."""
    await components.webhooks.delete(await components.webhooks.get(webhook_id, caller.sees_only), caller)


@router.get("/{webhook_id}/deliveries")
async def list_deliveries(
    webhook_id: WebhookId,
    caller: Reader,
    components: GivenComponents,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> DeliveryList:
    """List the messages of a webhook and their results, newest first."""
    webhook = await components.webhooks.get(webhook_id, caller.sees_only)
    found, more = await components.webhooks.deliveries_of(webhook.id, page_size, place_of(page_token))
    return DeliveryList(deliveries=[DeliveryView.of(delivery) for delivery in found], next_page_token=token_of(more))
