"""Routes for tokens, the audit and the current caller."""

from datetime import UTC, datetime, timedelta
from http import HTTPStatus

from fastapi import APIRouter, Request

from service.api import problems
from service.api.auth import Admin, Reader
from service.api.dependencies import Audit, TokenId, Tokens
from service.api.idempotency import Route, answer_repeats_with
from service.api.pagination import PageSize, PageToken, decode_page_token, encode_page_token
from service.api.schemas.access import (
    AuditList,
    AuditView,
    CallerView,
    MadeToken,
    MakeToken,
    TokenList,
    TokenView,
)
from service.domain.access import RESERVED_OWNERS, Token, new_secret
from service.domain.jobs import new_id
from trainer.jobspec import InvalidField

router = APIRouter(prefix="/v1", tags=["access"], route_class=Route)


@router.get("/me")
async def show_caller(caller: Reader) -> CallerView:
    """Show the owner and scopes of the current token."""
    return CallerView(owner=caller.owner, scopes=list(caller.scopes), token_id=caller.token_id)


@router.post("/tokens", status_code=201)
async def make_token(body: MakeToken, caller: Admin, token_store: Tokens, request: Request) -> MadeToken:
    """Create a token; its secret is only in this answer."""
    if body.owner in RESERVED_OWNERS:
        raise InvalidField("owner", body.owner, "must not be the name of a part of the service")
    now = datetime.now(UTC)
    token = Token(
        id=new_id("token"),
        owner=body.owner,
        name=body.name,
        scopes=tuple(dict.fromkeys(body.scopes)),
        created_at=now,
        expires_at=now + timedelta(seconds=body.expires_in_seconds) if body.expires_in_seconds else None,
    )
    secret = new_secret()
    await token_store.add(token, secret, caller)
    detail = (
        f"{token.id} was made by this request before, and its secret shown; if that is lost, revoke "
        "it and make another"
    )
    answer_repeats_with(request, problems.answer(HTTPStatus.CONFLICT, detail))
    return MadeToken(token=secret, **TokenView.model_validate(token).model_dump())


@router.get("/tokens")
async def list_tokens(
    _: Admin, token_store: Tokens, page_size: PageSize = 50, page_token: PageToken = None
) -> TokenList:
    """List tokens, without their secrets, newest first."""
    tokens, more = await token_store.page(page_size, decode_page_token(page_token))
    return TokenList(
        tokens=[TokenView.model_validate(token) for token in tokens], next_page_token=encode_page_token(more)
    )


@router.post("/tokens/{token_id:identifier}:revoke")
async def revoke_token(token_id: TokenId, caller: Admin, token_store: Tokens) -> TokenView:
    """Revoke a token. The last valid one with scope admin answers 409."""
    return TokenView.model_validate(await token_store.revoke(token_id, caller))


@router.get("/audit")
async def list_audit(
    _: Admin, audit_store: Audit, page_size: PageSize = 50, page_token: PageToken = None
) -> AuditList:
    """List created and revoked tokens and webhooks, newest first."""
    records, more = await audit_store.page(page_size, decode_page_token(page_token))
    return AuditList(
        records=[AuditView.model_validate(record) for record in records],
        next_page_token=encode_page_token(more),
    )
