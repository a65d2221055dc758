"""Page of tokens and webhooks."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from service.api.dependencies import TokenId, Tokens, WebhookClient, WebhookId, Webhooks
from service.api.pagination import decode_page_token, encode_page_token
from service.api.routes.tokens import make_token
from service.api.routes.webhooks import make_webhook
from service.api.schemas.access import MakeToken
from service.api.schemas.webhooks import ENDS, MakeWebhook
from service.api.web.drafts import Check, Errors
from service.api.web.forms import Form, read_form, validated
from service.api.web.pages import Admin, PageRoute, Reader, Submitter, page, see
from service.domain.access import Caller, Scope

PAGE_SIZE = 50
DAY_SECONDS = 86_400

router = APIRouter(prefix="/settings", include_in_schema=False, route_class=PageRoute)


class Lists:
    """Lists of the page."""

    def __init__(self, token_store: Tokens, webhook_store: Webhooks) -> None:
        self._tokens, self._webhooks = token_store, webhook_store

    async def read(
        self, caller: Caller, page_token: str | None = None, webhooks_page_token: str | None = None
    ) -> dict[str, Any]:
        """Return pages of tokens, for admins only, and of the webhooks that are seen."""
        is_admin = caller.may(Scope.ADMIN)
        tokens, more = (
            await self._tokens.page(PAGE_SIZE, decode_page_token(page_token)) if is_admin else ([], None)
        )
        webhooks, more_webhooks = await self._webhooks.page(
            PAGE_SIZE, decode_page_token(webhooks_page_token), caller.sees_only
        )
        return {
            "tokens": tokens,
            "more_tokens": more and f"/settings?page_token={encode_page_token(more)}",
            "webhooks": webhooks,
            "more_webhooks": more_webhooks
            and f"/settings?webhooks_page_token={encode_page_token(more_webhooks)}#webhooks-title",
            "is_later_page": bool(webhooks_page_token),
            "scopes": [scope.value for scope in (Scope.READ, Scope.SUBMIT, Scope.METRICS, Scope.ADMIN)],
            "ends": [state.value for state in ENDS],
            "is_admin": is_admin,
            "may_submit": caller.may(Scope.SUBMIT),
        }


SettingsLists = Annotated[Lists, Depends()]


@router.get("")
async def show_settings(
    request: Request,
    caller: Reader,
    lists: SettingsLists,
    page_token: Annotated[str, Query()] = "",
    webhooks_page_token: Annotated[str, Query()] = "",
) -> Response:
    """Show tokens and webhooks."""
    shown = await lists.read(caller, page_token, webhooks_page_token)
    return _settings_page(request, caller, shown)


@router.post("/tokens")
async def add_token(request: Request, caller: Admin, lists: SettingsLists, token_store: Tokens) -> Response:
    """Create a token, whose secret is shown on the answer only."""
    form = await read_form(request)
    try:
        days = form.text("days")
        seconds = int(days) * DAY_SECONDS if days.isascii() and days.isdecimal() else days or None
        body = {
            "owner": form.text("owner"),
            "name": form.text("name") or "token",
            "scopes": form.get("scopes", []),
            "expires_in_seconds": seconds,
        }
        made = await make_token(validated(MakeToken, body), caller, token_store, request)
    except Errors as error:
        return await _refused(request, caller, lists, error, form)
    return _settings_page(request, caller, await lists.read(caller), secret=made.token, secret_of=made.id)


@router.post("/tokens/{token_id:identifier}/revoke")
async def revoke_token(token_id: TokenId, caller: Admin, token_store: Tokens) -> Response:
    """Revoke a token."""
    await token_store.revoke(token_id, caller)
    return see("/settings")


@router.post("/webhooks")
async def add_webhook(
    request: Request,
    caller: Submitter,
    lists: SettingsLists,
    webhook_http: WebhookClient,
    webhook_store: Webhooks,
) -> Response:
    """Create a webhook, whose signing secret is shown on the answer only."""
    form = await read_form(request)
    try:
        body = {"url": form.text("url"), "states": form.get("states", []), "tag": form.text("tag") or None}
        made = await make_webhook(validated(MakeWebhook, body), caller, webhook_http, webhook_store)
    except Errors as error:
        return await _refused(request, caller, lists, error, form)
    return _settings_page(request, caller, await lists.read(caller), secret=made.secret, secret_of=made.id)


@router.post("/webhooks/{webhook_id:identifier}/delete")
async def delete_webhook(webhook_id: WebhookId, caller: Submitter, webhook_store: Webhooks) -> Response:
    """Delete a webhook."""
    await webhook_store.delete(await webhook_store.get(webhook_id, caller.sees_only), caller)
    return see("/settings")


async def _refused(request: Request, caller: Caller, lists: Lists, error: Exception, form: Form) -> Response:
    check = Check.failed(request, error)
    return _settings_page(
        request, caller, await lists.read(caller), errors=check.errors, form=form, status=422
    )


def _settings_page(request: Request, caller: Caller, lists: dict[str, Any], **content: Any) -> Response:
    defaults: dict[str, Any] = {"secret": None, "secret_of": None, "errors": (), "form": Form()}
    return page(request, "settings.html", caller, **(defaults | lists | content))
