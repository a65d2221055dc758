"""Sign-in of browsers: by a token in a form, or by a link that works once.

A browser then holds a session cookie, which opens the pages with the scopes of the token, and MLflow's pages
for reading. The session ends with its token, or after 12 hours.
"""

from datetime import UTC, datetime
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from service.api.auth import SESSION_COOKIE, caller_of_session, check_origin, limit_failure
from service.api.dependencies import Components, components_of
from service.api.web.pages import PageRoute, page, see
from service.domain.access import SESSION_LIFETIME, Caller, CredentialKind, Scope, Token, local_path

MAX_FORM_BYTES = 10_000
INVITATION = "These pages are open to holders of a token."
router = APIRouter(include_in_schema=False, route_class=PageRoute)


def sign_in_page(
    request: Request, target: str | None = None, refusal: str | None = None, *, status: int = 200
) -> HTMLResponse:
    """Return the page with the form; `target` is the next page."""
    return page(
        request,
        "sign_in.html",
        status=status,
        target=local_path(target),
        message=refusal or INVITATION,
        is_refused=refusal is not None,
    )


@router.get("/sign-in")
async def show_sign_in(request: Request, next: str | None = None) -> Response:  # noqa: A002
    """Show the form, which the code of a link submits automatically, or the next page."""
    if await caller_of_session(request) is not None:
        return see(local_path(next))
    return sign_in_page(request, next)


@router.get("/sign-in/session")
async def show_session(request: Request) -> Response:
    """Report whether the browser is signed in.

    The session is not sent with a link on another site, but with requests of the page that it leads to.
    """
    caller = await caller_of_session(request)
    return JSONResponse({"is_signed_in": caller is not None}, headers={"Cache-Control": "no-store"})


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Sign in with a token, or with the code of a link, which works once.

    A form on another site is refused: it could sign a browser in as somebody else.
    """
    components = components_of(request)
    check_origin(request)
    form = parse_qs((await _read(request)).decode(errors="replace"))
    secret, code, target = (form.get(name, [""])[0].strip() for name in ("token", "code", "next"))
    refusal = "This is not a valid token."
    if code:
        refusal = "This link has been used or has expired. Sign in with a token instead."
        token = await components.credentials.find_token(CredentialKind.SIGN_IN, code)
        # Of several requests with one code, one deletes it.
        if token is not None and not await components.credentials.delete(CredentialKind.SIGN_IN, code):
            token = None
    else:
        token = await components.tokens.find(secret) if secret else None
    if token is None:
        limit_failure(request)
        return sign_in_page(request, target, refusal, status=401)
    return await _start_session(request, components, token, target)


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session."""
    check_origin(request)
    if secret := request.cookies.get(SESSION_COOKIE):
        await components_of(request).credentials.delete(CredentialKind.SESSION, secret)
    answer = see("/sign-in")
    answer.delete_cookie(SESSION_COOKIE)
    return answer


async def _start_session(
    request: Request, components: Components, token: Token, target: str | None
) -> Response:
    if not token.is_valid(datetime.now(UTC)):
        limit_failure(request)
        return sign_in_page(request, target, "This token has expired or was revoked.", status=401)
    if not Caller(token.owner, token.scopes, token.id).may(Scope.READ):
        return sign_in_page(request, target, "Pages need a token with scope read.", status=403)
    if earlier := request.cookies.get(SESSION_COOKIE):
        await components.credentials.delete(CredentialKind.SESSION, earlier)
    secret = await components.credentials.add_for_token(CredentialKind.SESSION, token.id, SESSION_LIFETIME)
    answer = see(local_path(target))
    answer.set_cookie(
        SESSION_COOKIE,
        secret,
        max_age=int(SESSION_LIFETIME.total_seconds()),
        httponly=True,
        samesite="strict",
        secure=components.public_url.startswith("https:"),
    )
    return answer


def sign_in_url(public_url: str, code: str, target: str) -> str:
    """Return the URL of a link that signs in once and leads to `target`."""
    return f"{public_url}/sign-in#code={code}&next={quote(local_path(target), safe='/')}"


async def _read(request: Request) -> bytes:
    body = await request.body()
    if len(body) > MAX_FORM_BYTES:
        raise HTTPException(413)
    return body
