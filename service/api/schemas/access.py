"""Schemas of tokens, audit records and callers."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, Field

from service.api.schemas.names import Name
from service.domain.access import HOME, AuditRecord, Owner, Scope, Token
from trainer.jobspec import FrozenModel


class MakeToken(FrozenModel):
    """Request for a new token."""

    owner: Owner
    # JSON has no enumerations, so words are taken for them.
    scopes: Annotated[list[Annotated[Scope, Field(strict=False)]], Field(min_length=1, max_length=3)] = Field(
        description="read: look at the owner's own things; submit: and make and change them; admin: all things of all owners"
    )
    name: Name = Field("token", description="what it is for")
    expires_in_seconds: int | None = Field(None, ge=1, le=315_360_000, description="default: it does not expire")


class TokenView(BaseModel):
    """A token, without its secret."""

    id: str
    owner: str
    name: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(description="to the minute")

    @classmethod
    def of(cls, token: Token) -> "TokenView":
        """Show a token."""
        return cls(
            **{name: getattr(token, name) for name in cls.model_fields if name != "scopes"}, scopes=list(token.scopes)
        )


class MadeToken(TokenView):
    """New token with its secret, which is shown once."""

    token: str = Field(description="what goes into `Authorization: Bearer <token>`")


class TokenList(BaseModel):
    """A page of tokens, newest first."""

    tokens: list[TokenView]
    next_page_token: str | None


class MakeSignInLink(FrozenModel):
    """Target of a sign-in link."""

    next: str = Field(
        HOME,
        min_length=1,
        max_length=2_000,
        pattern=r"^/([^/\\\x00-\x20][^\\\x00-\x20]*)?$",
        description="path on this service, such as `/mlflow/#/experiments/1`",
    )


class SignInLink(BaseModel):
    """Link that signs a browser in once."""

    url: str


class AuditView(BaseModel):
    """Audit record of an action on a token or a webhook."""

    at: datetime
    actor: str = Field(description="whose token it was; `service`: the service itself, when it started")
    token_id: str | None = Field(description="the token that was shown")
    action: str
    subject: str
    detail: str

    @classmethod
    def of(cls, record: AuditRecord) -> "AuditView":
        """Show a record."""
        return cls(**{name: getattr(record, name) for name in cls.model_fields})


class AuditList(BaseModel):
    """A page of records, newest first."""

    records: list[AuditView]
    next_page_token: str | None


class CallerView(BaseModel):
    """Owner and scopes of the current token."""

    owner: str
    scopes: list[Scope]
    token_id: str
