"""Bodies that say that they are too large are refused unread, as problem details; others are counted as they come."""

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import problems


class DeclaredLength:
    """ASGI middleware that refuses by `Content-Length`, for which Starlette's own limit would answer in plain text."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_bytes_under: dict[str, int]) -> None:
        """Allow `max_bytes`, and other numbers under the path prefixes of `max_bytes_under`."""
        self._app, self._max_bytes, self._max_bytes_under = app, max_bytes, max_bytes_under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        declared = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        max_bytes = next(
            (limit for prefix, limit in self._max_bytes_under.items() if scope.get("path", "").startswith(prefix)),
            self._max_bytes,
        )
        if declared.isdecimal() and int(declared) > max_bytes:
            refusal = problems.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problems.too_large(max_bytes))
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)
