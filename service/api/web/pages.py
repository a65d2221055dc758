"""HTML pages: templates, callers by session, and errors as pages."""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.security import SecurityScopes
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.api import problems
from service.api.auth import caller_of_session, check_origin
from service.api.schemas import Problem
from service.api.security_headers import PAGES
from service.api.web.assets import asset_url
from service.api.web.filters import FILTERS
from service.domain.access import Caller, Scope
from service.domain.errors import ServiceError
from service.domain.mlflow_views import home_url
from service.rendering.documents import FUNCTIONS, TEMPLATES_OF_REPORTS
from trainer.jobspec import InvalidField

SEE_OTHER = 303
SAFE_METHODS = ("GET", "HEAD")
NAVIGATION = (
    ("/", "Overview", Scope.READ),
    ("/jobs", "Jobs", Scope.READ),
    ("/submit", "Submit", Scope.SUBMIT),
    ("/cluster", "Cluster", Scope.READ),
    ("/settings", "Settings", Scope.READ),
)
"""Address, label and needed scope of the pages in the header."""
MLFLOW_HOME = home_url("/mlflow")
HEADERS = {
    "Content-Security-Policy": PAGES,
    # Under `no-referrer`, browsers send `Origin: null` with forms, which would be refused.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader([Path(__file__).parent / "templates", TEMPLATES_OF_REPORTS]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= FILTERS
    made.globals |= {"asset": asset_url, "navigation": NAVIGATION, "mlflow_home": MLFLOW_HOME} | FUNCTIONS
    return made


TEMPLATES = _environment()


def page(
    request: Request, template: str, caller: Caller | None = None, *, status: int = 200, **content: Any
) -> HTMLResponse:
    """Return a page made from a template.

    Templates know `caller`, `path`, `now` and what `content` has.
    """
    known = {"caller": caller, "path": request.url.path, "now": datetime.now(UTC)}
    return HTMLResponse(TEMPLATES.get_template(template).render(known | content), status, HEADERS)


def see(path: str) -> Response:
    """Return the answer to a form that leads to another page."""
    return RedirectResponse(path, SEE_OTHER, HEADERS)


class NotSignedIn(HTTPException):
    """Request of a page without a valid session."""

    def __init__(self) -> None:
        super().__init__(401, "this page needs a session: sign in at /sign-in")


async def _caller(request: Request, needed: SecurityScopes) -> Caller:
    caller = await caller_of_session(request)
    if caller is None:
        raise NotSignedIn
    request.state.page_caller = caller
    if request.method not in SAFE_METHODS:
        check_origin(request)
    for scope in needed.scopes:
        if not caller.may(Scope(scope)):
            held = ", ".join(caller.scopes)
            raise HTTPException(403, f"this page needs a token with scope {scope}; yours has {held}")
    return caller


Reader = Annotated[Caller, Security(_caller, scopes=[Scope.READ.value])]
Submitter = Annotated[Caller, Security(_caller, scopes=[Scope.SUBMIT.value])]
Admin = Annotated[Caller, Security(_caller, scopes=[Scope.ADMIN.value])]


class PageRoute(APIRoute):
    """Route whose errors are pages, and which leads to the sign-in page first."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()

        async def handle_as_page(request: Request) -> Response:
            try:
                return await handle(request)
            except NotSignedIn:
                return _sign_in_first(request)
            except (HTTPException, ServiceError, InvalidField, RequestValidationError) as error:
                return error_page(request, error)

        return handle_as_page


def error_page(request: Request, error: Exception) -> Response:
    """Return the page of an error, with the status and text that the API answers with."""
    answer = problems.answer_of(request, error)
    problem = Problem.model_validate_json(bytes(answer.body))
    caller: Caller | None = getattr(request.state, "page_caller", None)
    shown = page(request, "error.html", caller, status=problem.status, problem=problem)
    if (wait := answer.headers.get("Retry-After")) is not None:
        shown.headers["Retry-After"] = wait
    return shown


def _sign_in_first(request: Request) -> Response:
    """Return the way to the sign-in page, and from there back to this one."""
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    address = f"/sign-in?next={quote(target if request.method in SAFE_METHODS else '/', safe='/')}"
    if request.headers.get("HX-Request"):  # htmx would put the sign-in page into this one
        return Response(status_code=204, headers={"HX-Redirect": address})
    return see(address)
