"""Page of the API's operations: Swagger UI from the packaged files."""

from fastapi import APIRouter, Request, Response

from service.api.auth import caller_of_session
from service.api.web.pages import PageRoute, page

router = APIRouter(include_in_schema=False, route_class=PageRoute)


@router.get("/docs")
async def show_docs(request: Request) -> Response:
    """Show the operations of the API, also without a session."""
    return page(request, "docs.html", await caller_of_session(request))
