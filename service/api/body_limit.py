"""Bodies that say that they are too large are refused unread, as problem details; others are counted as they come."""

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import problems


class DeclaredLength:
    """ASGI middleware that refuses by `Content-Length`, for which Starlette's own limit would answer in plain text."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if declared.isdecimal() and int(declared) > self._most_bytes:
            refusal = problems.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problems.too_large(self._most_bytes))
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)
