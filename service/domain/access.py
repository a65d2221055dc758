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
"""Names that owners must not have: parts of the service in events, and the folder of shared secrets."""

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
    """Scopes of a token: read own jobs, also submit and change them, or everything.

    `metrics` opens `/metrics` alone.
    """

    METRICS = "metrics"
    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


IMPLIED: dict[Scope, frozenset[Scope]] = {
    Scope.METRICS: frozenset({Scope.METRICS}),
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
    """Purpose, as its creator describes it."""
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    """Time of last use, accurate to a minute."""

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
    """Number that increases over all records, assigned by the database."""
    at: datetime
    actor: str
    """Owner of the token that was used, or part of the service."""
    token_id: str | None
    """Token that was used; None for a part of the service."""
    action: str
    """Name of the action, such as `token.create`."""
    subject: str
    """Identifier of the object of the action."""
    detail: str


def new_secret() -> str:
    """Return a new secret of 256 random bits."""
    return SECRET_PREFIX + secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """Hash a secret.

    A fast hash suffices for 256 random bits, and every request needs one.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


MAX_BUCKETS = 10_000
"""Maximum number of buckets before full ones, which hold no information, are dropped."""


class RateLimit:
    """Token bucket per name: `burst` requests at once, `per_second` sustained."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._interval, self._span = 1 / per_second, burst / per_second
        self._full_at: dict[str, float] = {}

    def take(self, name: str, now: float) -> float:
        """Take a token at time `now`; return 0, or the seconds to wait."""
        # Generic cell rate algorithm: one number per bucket, the time at which it will be full again.
        full_at = max(self._full_at.get(name, now), now) + self._interval
        # The tolerance absorbs rounding of sums of the interval.
        if (early := full_at - now - self._span) > 1e-9:
            return early
        if len(self._full_at) >= MAX_BUCKETS:
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[name] = full_at
        return 0.0


SIGN_IN_LINK_LIFETIME = timedelta(minutes=10)
SESSION_LIFETIME = timedelta(hours=12)
HOME = "/"
"""Default page after sign-in."""


class CredentialKind(StrEnum):
    """Kinds of credentials."""

    SIGN_IN = "sign_in"
    """Single sign-in of a browser."""
    SESSION = "session"
    """Session of a browser."""
    ATTEMPT = "attempt"
    """Writes of a running attempt to its MLflow run."""


def local_path(target: str | None) -> str:
    """Return `target` if it is a path of this service, else the home page."""
    # Browsers read `//host` and `/\host` as another site, and drop control characters before parsing.
    is_local = target is not None and target.startswith("/") and not target.startswith(("//", "/\\"))
    has_controls = target is not None and any(ord(letter) < 0x20 or letter == "\\" for letter in target)
    return target if target is not None and is_local and not has_controls else HOME
