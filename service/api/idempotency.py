"""Idempotency keys: a repeated request is done once and gets the same answer."""

import hashlib
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import HTTPException, Request, Response, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from service.api.auth import authenticate
from service.api.dependencies import components_of
from service.api.json_body import JsonRequest
from service.domain.access import Caller
from service.domain.errors import RequestInProgress
from service.store.idempotency import IN_FLIGHT, StoredAnswer
from trainer.jobspec import InvalidField

LARGE_BYTES, LARGE_PATH = 10_000, "/v1/comparisons"
"""Size and path of requests that take long; the body of a comparison may be short and stand for many jobs."""
HEADER, REPLAYED = "Idempotency-Key", "Idempotency-Replayed"
TAKES = "must be 1 to 255 visible ASCII characters"
PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "new for each request, such as a UUID: the same request under the same key is done "
    "once, and gets the same "
    "answer for 24 hours at least",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


class KnownCaller(APIRoute):
    """Route that authenticates first, and refuses unknown query parameters."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()
        names = {
            parameter.alias
            for parameter in get_flat_params(self.dependant)
            if isinstance(parameter.field_info, params.Query)
        }

        async def handle_known(request: Request) -> Response:
            request = JsonRequest.of(request)
            await authenticate(request)
            for name, value in request.query_params.items():
                if name not in names:
                    known = f"must be one of {', '.join(sorted(names))}" if names else "this call has none"
                    raise InvalidField(f"query parameter {name[:100]}", value, known)
            is_large = len(await _body_of(request)) > LARGE_BYTES
            if not (is_large or (request.method == "POST" and request.url.path.startswith(LARGE_PATH))):
                return await handle(request)
            async with components_of(request).large_requests:
                return await handle(request)

        return handle_known


class Route(KnownCaller):
    """Route whose POST requests may be repeated with an idempotency key.

    What a POST stores and its answer are committed in one transaction, so a crash leaves both or neither;
    after an error the key is free. The key is taken with the first write: what a route asks of others, it
    asks before.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["openapi_extra"] = {"parameters": [PARAMETER]} | (options.get("openapi_extra") or {})
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of authenticated requests."""
        handle = super().get_route_handler()

        async def handle_once(request: Request) -> Response:
            key = request.headers.get(HEADER)
            if request.method != "POST" or key is None:
                return await handle(request)
            caller = await authenticate(request)
            if not re.fullmatch(r"[!-~]{1,255}", key):
                raise InvalidField(HEADER, key, TAKES)
            return await answer_once(request, caller, key, handle)

        return handle_once


def answer_repeats_with(request: Request, answer: Response) -> None:
    """Set the stored answer of a request, where the first answer contains a secret."""
    request.state.answer_to_repeats = answer


async def answer_once(
    request: Request, caller: Caller, key: str, handle: Callable[[Request], Coroutine[Any, Any, Response]]
) -> Response:
    """Handle a request once per key, and answer repetitions with its first response.

    Raises RequestInProgress, and InvalidField if the key was used for another request.
    """
    components = components_of(request)
    # Before the transaction, since the body may be slow to come.
    fingerprint = await _fingerprint(request, caller)

    async def take() -> None:
        await components.idempotency.take(caller.owner, key)

    with _in_flight(components.keys_in_flight, (caller.owner, key)):
        try:
            async with components.database.transaction(take):
                answer = await handle(request)
                kept = getattr(request.state, "answer_to_repeats", answer)
                headers = {name: value for name, value in kept.headers.items() if name != "content-length"}
                stored = StoredAnswer(fingerprint, kept.status_code, headers, bytes(kept.body))
                await components.idempotency.store(caller.owner, key, stored)
                return answer
        except Exception:
            # A repetition gets the first response, even if the same request would fail now.
            if (before := await components.idempotency.find(caller.owner, key)) is None:
                raise
    if before.fingerprint != fingerprint:
        raise InvalidField(
            HEADER, key, "must be a new key for each request; this one was used for another request"
        )
    return Response(before.body, before.status, headers=before.headers | {REPLAYED: "true"})


async def _fingerprint(request: Request, caller: Caller) -> str:
    """Return a digest of a request and the scopes of its token."""
    body = await _body_of(request)
    parts = [request.method, request.url.path, request.url.query, " ".join(sorted(caller.scopes))]
    return hashlib.sha256("\n".join(parts).encode() + b"\n" + body).hexdigest()


async def _body_of(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise HTTPException(400) from error


@contextmanager
def _in_flight(keys: set[tuple[str, str]], key: tuple[str, str]) -> Iterator[None]:
    if key in keys:
        raise RequestInProgress(IN_FLIGHT)
    keys.add(key)
    try:
        yield
    finally:
        keys.remove(key)
