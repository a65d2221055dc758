"""Schemas of tokens, audit records and callers."""

from datetime import datetime
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from service.api.schemas.names import Examples, Name
from service.domain.access import HOME, Owner, Scope
from trainer.jobspec import FrozenModel


class MakeToken(FrozenModel):
    """Request for a new token."""

    EXAMPLES: ClassVar[Examples] = {
        "to submit, for 90 days": {
            "owner": "ann",
            "scopes": ["submit"],
            "name": "laptop",
            "expires_in_seconds": 7_776_000,
        },
        "to look at an owner's jobs": {"owner": "ann", "scopes": ["read"], "name": "dashboard"},
    }

    owner: Owner
    # JSON has no enumerations, so words are taken for them.
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=4)] = Field(
        description="read: look at the owner's own things; submit: and make and change them; metrics: read "
        "/metrics alone; admin: all things of all owners"
    )
    name: Name = Field("token", description="what it is for")
    expires_in_seconds: int | None = Field(
        None, ge=1, le=315_360_000, description="default: it does not expire"
    )


class TokenView(BaseModel):
    """A token, without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["token-7c1d90ab34ef"])
    owner: str = Field(examples=["ann"])
    name: str = Field(examples=["laptop"])
    scopes: list[Scope] = Field(examples=[["submit"]])
    created_at: datetime = Field(examples=["2026-03-02T09:30:00Z"])
    expires_at: datetime | None = Field(examples=["2026-05-31T09:30:00Z"])
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="to the minute")


class MadeToken(TokenView):
    """New token with its secret, which is shown once."""

    token: str = Field(examples=["syncbn_…"], description="what goes into `Authorization: Bearer <token>`")


class TokenList(BaseModel):
    """A page of tokens, newest first."""

    tokens: list[TokenView]
    next_page_token: str | None


class MakeSignInLink(FrozenModel):
    """Target of a sign-in link."""

    EXAMPLES: ClassVar[Examples] = {
        "to a run in MLflow": {
            "next": "/mlflow/#/experiments/1/runs/0d3f5c1b9a7e4f62?workflowType=machine_learning"
        }
    }

    next: str = Field(
        HOME,
        min_length=1,
        max_length=2_000,
        pattern=r"^/([^/\\\x00-\x20][^\\\x00-\x20]*)?$",
        description="path on this service, such as `/mlflow/#/experiments/1`",
    )


class SignInLink(BaseModel):
    """Link that signs a browser in once."""

    url: str = Field(examples=["http://127.0.0.1:8000/sign-in#code=syncbn_…&next=/mlflow/%23/experiments/1"])


class AuditView(BaseModel):
    """Audit record of an action on a token or a webhook."""

    model_config = ConfigDict(from_attributes=True)

    at: datetime = Field(examples=["2026-03-02T09:30:00Z"])
    actor: str = Field(
        examples=["admin"], description="whose token it was; `service`: the service itself, when it started"
    )
    token_id: str | None = Field(examples=["token-b022d492890b"], description="the token that was shown")
    action: str = Field(examples=["token.create"])
    subject: str = Field(examples=["token-7c1d90ab34ef"])
    detail: str = Field(examples=["of ann, with submit"])


class AuditList(BaseModel):
    """A page of records, newest first."""

    records: list[AuditView]
    next_page_token: str | None


class CallerView(BaseModel):
    """Owner and scopes of the current token."""

    owner: str = Field(examples=["ann"])
    scopes: list[Scope] = Field(examples=[["submit"]])
    token_id: str = Field(examples=["token-7c1d90ab34ef"])
