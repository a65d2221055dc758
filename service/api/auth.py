"""Authentication by bearer token or session, and scopes of routes."""

import logging
import math
import time
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from service.api.dependencies import Components, components_of
from service.domain.access import Caller, CredentialKind, Scope, Token
from service.domain.errors import UpstreamUnavailable

logger = logging.getLogger(__name__)
SESSION_COOKIE = "syncbn_session"
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
bearer = HTTPBearer(
    auto_error=False, description="a token, as `POST /v1/tokens` or `syncbn token create` makes them"
)


async def authenticate(request: Request) -> Caller:
    """Authenticate a request, once. Raises HTTPException with 401 or 429.

    The answer to a wrong token is the same whether it is unknown, expired or revoked.
    """
    # Routes with idempotency keys authenticate before FastAPI's dependencies do; a request counts once.
    known: Caller | None = getattr(request.state, "caller", None)
    if known is not None:
        return known
    components = components_of(request)
    credentials = await bearer(request)
    token = await components.tokens.find(credentials.credentials) if credentials else None
    if token is None or not token.is_valid(datetime.now(UTC)):
        limit_failure(request)
        detail = "this call needs the header `Authorization: Bearer <token>` with a valid token"
        raise HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})
    request.state.caller = caller = await _admit(components, token)
    return caller


async def caller_of_session(request: Request) -> Caller | None:
    """Return the caller of a session cookie, or None. Raises HTTPException with 429."""
    secret = request.cookies.get(SESSION_COOKIE)
    if not secret:
        return None
    components = components_of(request)
    token = await components.credentials.find_token(CredentialKind.SESSION, secret)
    if token is None or not token.is_valid(datetime.now(UTC)):
        limit_failure(request)
        return None
    return await _admit(components, token)


def is_own_origin(request: Request) -> bool:
    """Return whether a request comes from a page of this service.

    Browsers send the origin with every POST, so one without it is none of theirs.
    """
    public = urlsplit(components_of(request).public_url)
    own = {
        _origin(public.scheme, public.netloc),
        _origin(request.url.scheme, request.headers.get("Host", "")),
    }
    return request.headers.get("Origin") in own


def check_origin(request: Request) -> None:
    """Refuse a request from a page of another site. Raises HTTPException with 403."""
    if not is_own_origin(request):
        raise HTTPException(403, f"Origin: must be this service (got {request.headers.get('Origin')!r})")


def _origin(scheme: str, authority: str) -> str:
    """Return an origin as browsers write it, without the default port."""
    return f"{scheme}://{authority.lower().removesuffix(DEFAULT_PORTS.get(scheme, ''))}"


async def _admit(components: Components, token: Token) -> Caller:
    limit_rate(components, token.id)
    try:
        await components.tokens.note_use(token)
    except UpstreamUnavailable as error:  # no reason to turn anybody away
        logger.warning("the last use of token %s could not be stored: %s", token.id, error)
    return Caller(token.owner, token.scopes, token.id)


def limit_rate(components: Components, name: str) -> None:
    """Count a request of a token or attempt. Raises HTTPException with 429."""
    _limit(components.rates.take(name, time.monotonic()))


def limit_failure(request: Request) -> None:
    """Count a request without valid credentials, by address.

    Raises HTTPException with 429.

    Valid credentials are not limited by address, since all callers behind a proxy may share one.
    """
    address = request.client.host if request.client else ""
    _limit(components_of(request).failures.take(address, time.monotonic()))


async def _caller(
    request: Request,
    needed: SecurityScopes,
    _: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
) -> Caller:
    caller = await authenticate(request)
    for scope in needed.scopes:
        if not caller.may(Scope(scope)):
            challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
            held = ", ".join(caller.scopes)
            detail = f"this call needs a token with scope {scope}; this one has {held}"
            raise HTTPException(403, detail, headers={"WWW-Authenticate": challenge})
    return caller


Reader = Annotated[Caller, Security(_caller, scopes=[Scope.READ.value])]
Submitter = Annotated[Caller, Security(_caller, scopes=[Scope.SUBMIT.value])]
MetricsReader = Annotated[Caller, Security(_caller, scopes=[Scope.METRICS.value])]
Admin = Annotated[Caller, Security(_caller, scopes=[Scope.ADMIN.value])]


def _limit(seconds_early: float) -> None:
    if seconds_early > 0:
        seconds = math.ceil(seconds_early)
        detail = f"too many requests; try again in {seconds} s"
        raise HTTPException(429, detail, headers={"Retry-After": str(seconds)})
