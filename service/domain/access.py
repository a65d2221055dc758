"""Tokens, scopes, credentials, rate limits, and visibility of jobs."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated

from pydantic import Field

SECRET_PREFIX = "syncbn_"  # noqa: S105 - what a token begins with, so that scanners of leaked secrets know it
RESERVED_OWNERS = frozenset({"dispatcher", "service", "shared"})
"""Names of parts of the service in events, and of the folder of secrets that all may use."""

Owner = Annotated[
    str,
    Field(
        min_length=1,
        max_length=80,
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        description="lower-case letters, digits and ._- ; starts with a letter or digit",
    ),
]


class Scope(StrEnum):
    """Scopes of a token: read own jobs, also submit and change them, or everything."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


IMPLIED: dict[Scope, frozenset[Scope]] = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.SUBMIT: frozenset({Scope.READ, Scope.SUBMIT}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True, kw_only=True)
class Token:
    """Token without its secret, which is stored as a hash."""

    id: str
    owner: str
    name: str
    """What it is for, in its maker's words."""
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    """To the minute."""

    def is_valid(self, now: datetime) -> bool:
        """Return whether the token is valid."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True)
class Caller:
    """Caller of a request: owner and scopes of the token."""

    owner: str
    scopes: tuple[Scope, ...]
    token_id: str

    def may(self, scope: Scope) -> bool:
        """Return whether one of the scopes is, or implies, `scope`."""
        return any(scope in IMPLIED[held] for held in self.scopes)

    @property
    def sees_only(self) -> str | None:
        """Owner whose jobs the caller sees; None for all (scope admin)."""
        return None if self.may(Scope.ADMIN) else self.owner


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """Audit record."""

    sequence: int = 0
    """Grows over all records; the database gives it."""
    at: datetime
    actor: str
    """Whose token it was, or the part of the service."""
    token_id: str | None
    """The token that was shown; None for a part of the service."""
    action: str
    """Such as `token.create`."""
    subject: str
    """Identifier of what it was done to."""
    detail: str


def new_secret() -> str:
    """Return a new secret of 256 random bits."""
    return SECRET_PREFIX + secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """Hash a secret. A fast hash suffices for 256 random bits, and every request needs one."""
    return hashlib.sha256(secret.encode()).hexdigest()


MOST_NAMES = 10_000
"""Buckets that are kept before the full ones, which say nothing, are thrown away."""


class RateLimit:
    """Token bucket per name: `burst` requests at once, `per_second` sustained."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._interval, self._span = 1 / per_second, burst / per_second
        self._full_at: dict[str, float] = {}

    def take(self, name: str, now: float) -> float:
        """Take a token at time `now`; return 0, or the seconds to wait."""
        full_at = max(self._full_at.get(name, now), now) + self._interval
        if (early := full_at - now - self._span) > 1e-9:
            return early
        if len(self._full_at) >= MOST_NAMES:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[name] = full_at
        return 0.0


SIGN_IN_LINK_LIFETIME = timedelta(minutes=10)
SESSION_LIFETIME = timedelta(hours=12)
HOME = "/mlflow/"
"""Page that a browser is sent to after sign-in, unless it asked for another one."""


class CredentialKind(StrEnum):
    """Kinds of credentials."""

    SIGN_IN = "sign_in"
    """One sign-in of a browser; used up by it."""
    SESSION = "session"
    """A signed-in browser."""
    ATTEMPT = "attempt"
    """Writes of one running attempt to its MLflow run."""


def local_path(target: str | None) -> str:
    """Return `target` if it is a path of this service, else the home page."""
    is_local = target is not None and target.startswith("/") and not target.startswith(("//", "/\\"))
    has_controls = target is not None and any(ord(letter) < 0x20 or letter == "\\" for letter in target)
    return target if target is not None and is_local and not has_controls else HOME
