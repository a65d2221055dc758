"""Sign-in of browsers: by a token in a form, or by a link that works once.

A browser then holds a session cookie, which opens MLflow's pages for reading. The session ends with its token, or after 12 hours.
"""

import base64
import hashlib
import html
from datetime import UTC, datetime
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from service.api.auth import SESSION_COOKIE, limit_failure
from service.api.dependencies import Components, components_of
from service.domain.access import SESSION_LIFETIME, CredentialKind, Token, local_path

SEE_OTHER = 303
MAX_FORM_BYTES = 10_000
# What follows the # of an address is not sent, so a link's code is in no log, and who previews a link does not use it up. On
# MLflow's pages it names a run, and the form takes it along.
SCRIPT = """
const form = document.forms[0], given = new URLSearchParams(location.hash.slice(1));
if (location.pathname === "/sign-in" && given.has("code")) {
  form.code.value = given.get("code");
  form.next.value = given.get("next");
  history.replaceState(null, "", "/sign-in");
  form.submit();
}
form.onsubmit = () => { form.next.value += location.hash; };
"""
STYLE = (
    "body{font:16px sans-serif;max-width:32rem;margin:15vh auto;padding:0 1rem}input{width:100%;box-sizing:border-box}"
)
POLICY = (
    "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sign in to syncbn</title><style>{style}</style></head>
<body><h1>Sign in</h1>
<p>{message}</p>
<form method="post" action="/sign-in">
<p><label>Token <input name="token" type="password" autocomplete="current-password" autofocus required></label></p>
<input name="next" type="hidden" value="{target}">
<input name="code" type="hidden">
<p><button>Sign in</button></p>
</form>
<p>A token is made by <code>syncbn token create</code>; <code>syncbn open</code> prints a link that signs in without one.</p>
<script>{script}</script></body></html>
"""

INVITATION = "MLflow's pages are open to holders of a token."
router = APIRouter(include_in_schema=False)


def sign_in_page(target: str | None = None, message: str = INVITATION, *, status: int = 200) -> HTMLResponse:
    """Return the page with the form; `target` is the next page."""
    content = PAGE.format(
        style=STYLE, script=SCRIPT, message=html.escape(message), target=html.escape(local_path(target), quote=True)
    )
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(content, status, headers)


@router.get("/sign-in")
async def show_sign_in(next: str | None = None) -> Response:  # noqa: A002
    """Show the form, which the code of a link submits automatically."""
    return sign_in_page(next)


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Sign in with a token, or with the code of a link, which works once."""
    form = parse_qs((await _read(request)).decode(errors="replace"))
    secret, code, target = (form.get(name, [""])[0].strip() for name in ("token", "code", "next"))
    components = components_of(request)
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
        return sign_in_page(target, refusal, status=401)
    return await _start_session(request, components, token, target)


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session."""
    if secret := request.cookies.get(SESSION_COOKIE):
        await components_of(request).credentials.delete(CredentialKind.SESSION, secret)
    answer = RedirectResponse("/sign-in", SEE_OTHER)
    answer.delete_cookie(SESSION_COOKIE)
    return answer


async def _start_session(request: Request, components: Components, token: Token, target: str | None) -> Response:
    if not token.is_valid(datetime.now(UTC)):
        limit_failure(request)
        return sign_in_page(target, "This token has expired or was revoked.", status=401)
    secret = await components.credentials.add_for_token(CredentialKind.SESSION, token.id, SESSION_LIFETIME)
    answer = RedirectResponse(local_path(target), SEE_OTHER, headers={"Cache-Control": "no-store"})
    answer.set_cookie(
        SESSION_COOKIE,
        secret,
        max_age=int(SESSION_LIFETIME.total_seconds()),
        httponly=True,
        samesite="lax",
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
