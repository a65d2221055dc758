"""Reverse proxy to MLflow under `/mlflow/`, the only way to it from outside.

Browsers come with a session, programs with a token of scope read, and both may read. Attempts come with a
credential of their own and may write to their run. `service.domain.mlflow_access` decides what is forwarded,
`service.domain.mlflow_queries` bounds what a query makes MLflow do. Files and answers are streamed; each
request has a time limit.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
from cachetools import TTLCache
from fastapi import HTTPException, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette import types

from service.adapters.mlflow_http import RETURNED_HEADERS, Kind, MlflowHttp
from service.api import problems
from service.api.auth import authenticate, bearer, caller_of_session, limit_rate
from service.api.dependencies import components_of
from service.api.json_body import in_thread
from service.api.sign_in import sign_in_page
from service.domain.access import Scope
from service.domain.errors import NotFound, UpstreamUnavailable
from service.domain.mlflow_access import MAX_JSON_BYTES, Grant, is_clean, is_readable, of_attempt
from service.domain.mlflow_queries import MAX_QUERY_BYTES, bounded
from service.store.credentials import CredentialStore
from trainer.jobspec import InvalidField

PREFIX = "/mlflow"
UPLOADS = f"{PREFIX}/api/2.0/mlflow-artifacts/"
COUNTED_BYTES = 8_000_000
"""Bytes of an upload without declared length between two updates of the database."""
MIN_COUNTED_BYTES = 1_000_000
"""Minimum size that a file, dataset or logged model counts for, which bounds their number."""
MAX_SECONDS, MAX_FILE_SECONDS = 120.0, 3600.0
"""Timeout of a request with its response, and the same if one of them is a file."""
MAX_READS, MAX_UPLOADS = 16, 4
"""Maximum number of concurrent requests per token, and of uploads per attempt."""
PAGES_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-src 'self' blob: "
    "data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
ARTIFACT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of files that user code has written: their scripts do not run with the service's
origin.
"""
ARTIFACT_PATHS = ("/get-artifact", "/ajax-api/2.0/mlflow-artifacts/", "/api/2.0/mlflow-artifacts/")
Charge = Callable[[int], Awaitable[None]]
"""Function that counts bytes of an upload. Raises HTTPException with 413 above the limit of the attempt."""


class Slots:
    """Bounded number of concurrent requests per caller."""

    def __init__(self, maximum: int) -> None:
        self._maximum, self._taken = maximum, Counter[str]()

    def take(self, name: str) -> Callable[[], None]:
        """Take a slot; return the function that releases it.

        Raises HTTPException with 429.
        """
        if self._taken[name] >= self._maximum:
            detail = f"at most {self._maximum} such requests at the same time"
            raise HTTPException(429, detail, headers={"Retry-After": "1"})
        self._taken[name] += 1

        def release() -> None:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]

        return release


class ForwardedAnswer(StreamingResponse):
    """Streamed answer of MLflow, until `deadline` of the event loop's clock.

    However it ends, the connection to MLflow and the caller's slot are free afterwards.
    """

    def __init__(
        self, answer: httpx.Response, path: str, deadline: float, release: Callable[[], None]
    ) -> None:
        self._answer, self._deadline, self._release = answer, deadline, release
        headers = {name: answer.headers[name] for name in RETURNED_HEADERS if name in answer.headers}
        headers["Content-Security-Policy"] = ARTIFACT_POLICY if _is_artifact(path) else PAGES_POLICY
        headers["X-Frame-Options"] = "SAMEORIGIN"  # MLflow's page shows some of its own in frames
        super().__init__(answer.aiter_raw(), answer.status_code, headers=headers)

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Send the answer until its end or the end of the connection."""
        try:
            async with asyncio.timeout_at(self._deadline):
                await super().__call__(scope, receive, send)
        finally:
            self._release()
            await self._answer.aclose()


class MlflowProxy:
    """Authorises and forwards requests under `/mlflow/`."""

    def __init__(self, max_attempt_bytes: int) -> None:
        self._max_attempt_bytes = max_attempt_bytes
        self._readers, self._uploads = Slots(MAX_READS), Slots(MAX_UPLOADS)
        self._owned: TTLCache[tuple[str, str], bool] = TTLCache(1_000, 600)
        """Cache of pairs of a run and its model; the run of a model never changes."""

    async def forward(self, request: Request) -> Response:
        """Forward one request.

        Raises HTTPException, InvalidField, NotFound and UpstreamUnavailable.
        """
        path = request.scope["path"].removeprefix(PREFIX)
        if not path:  # the page's own addresses are relative to the folder
            return RedirectResponse(f"{PREFIX}/")
        if not is_clean(path):
            raise InvalidField(
                "path", path, "must not have empty or relative parts, backslashes or encoded percent signs"
            )
        credentials = await bearer(request)
        components = components_of(request)
        # Attempts and users send their credentials in the same header.
        grant = await components.credentials.find_grant(credentials.credentials) if credentials else None
        if credentials and grant:
            limit_rate(components, f"attempt of {grant.job_id}")
            charge = partial(self._charge, components.credentials, credentials.credentials)
            return await self._forward_attempt(request, components.mlflow_http, grant, path, charge)
        caller = await (authenticate(request) if credentials else caller_of_session(request))
        if caller is None:
            if request.method == "GET" and path == "/":
                return sign_in_page(request, f"{PREFIX}/", status=401)
            raise HTTPException(
                401, "sign in at /sign-in, or send a token", headers={"WWW-Authenticate": "Bearer"}
            )
        if not caller.may(Scope.READ):
            raise HTTPException(403, "MLflow needs a token with scope read")
        if not is_readable(request.method, path):
            raise HTTPException(403, f"{request.method} {path} is not forwarded to MLflow")
        body = await _read(request, MAX_QUERY_BYTES) if request.method == "POST" else None
        # In a thread: parsing large JSON and GraphQL would delay other requests.
        query, content = await in_thread(bounded, path, request.query_params.multi_items(), body)
        # The bounded body may have another length.
        headers = {name: value for name, value in request.headers.items() if name != "content-length"}
        release = self._readers.take(caller.token_id)
        return await self._send(
            components.mlflow_http,
            request.method,
            path,
            release,
            query=query,
            headers=headers,
            content=content,
        )

    async def _forward_attempt(
        self, request: Request, mlflow: MlflowHttp, grant: Grant, path: str, charge: Charge
    ) -> Response:
        is_upload = request.method == "PUT"
        body = b"" if is_upload else await _read(request, MAX_JSON_BYTES)
        forwarded = await in_thread(of_attempt, grant, request.method, path, dict(request.query_params), body)
        if forwarded is None:
            raise HTTPException(403, f"{request.method} {path} is not open to the attempt of a job")
        if forwarded.model_id is not None and not await self._owns_model(mlflow, grant, forwarded.model_id):
            raise NotFound(f"the run of this attempt has no logged model {forwarded.model_id!r}")
        if forwarded.is_counted:
            await charge(max(len(body), MIN_COUNTED_BYTES))
        headers = dict(request.headers)
        if not is_upload:
            headers = {name: value for name, value in headers.items() if not name.startswith("content-")}
        content: bytes | AsyncIterator[bytes] | None = _counted(request, charge) if is_upload else None
        if forwarded.body is not None:  # as escapes of ASCII, for text may hold half a surrogate pair
            headers["content-type"], content = "application/json", json.dumps(forwarded.body).encode()
        release = self._uploads.take(grant.job_id) if is_upload else _nothing
        kind = Kind.UPLOAD if is_upload else Kind.METRICS
        return await self._send(
            mlflow,
            request.method,
            path,
            release,
            query=forwarded.query.items(),
            headers=headers,
            content=content,
            kind=kind,
        )

    async def _send(
        self, mlflow: MlflowHttp, method: str, path: str, release: Callable[[], None], **arguments: Any
    ) -> Response:
        seconds = MAX_FILE_SECONDS if _is_artifact(path) else MAX_SECONDS
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                answer = await mlflow.send(method, quote(path), **arguments)
        except TimeoutError:
            release()
            raise UpstreamUnavailable(f"MLflow did not answer within {seconds:.0f} s") from None
        except BaseException:
            release()
            raise
        return ForwardedAnswer(answer, path, deadline, release)

    async def _charge(self, credentials: CredentialStore, secret: str, number: int) -> None:
        if not await credentials.count_upload(secret, number, self._max_attempt_bytes):
            raise HTTPException(
                413, f"an attempt may upload at most {self._max_attempt_bytes:,} bytes in all"
            )

    async def _owns_model(self, mlflow: MlflowHttp, grant: Grant, model_id: str) -> bool:
        if (grant.run_id, model_id) not in self._owned:
            found = await mlflow.get_json(f"/api/2.0/mlflow/logged-models/{model_id}")
            info = ((found or {}).get("model") or {}).get("info") or {}
            if info.get("source_run_id") != grant.run_id:
                return False
            self._owned[grant.run_id, model_id] = True
        return True


def _nothing() -> None:
    return


def _is_artifact(path: str) -> bool:
    return path.startswith(ARTIFACT_PATHS) or path.endswith("/artifacts/files")


async def _counted(request: Request, charge: Charge) -> AsyncIterator[bytes]:
    """Yield the body of an upload. Raises HTTPException with 413 beyond the limit."""
    # Charged before forwarding, so that a rejected upload never reaches MLflow. The declared length may be
    # missing or wrong, so the bytes that arrive are counted too.
    counted = max(int(request.headers.get("content-length", 0)), MIN_COUNTED_BYTES)
    await charge(counted)
    uncounted = -counted
    async for part in request.stream():
        uncounted += len(part)
        if uncounted >= COUNTED_BYTES:
            await charge(uncounted)
            uncounted = 0
        yield part
    if uncounted > 0:
        await charge(uncounted)


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise HTTPException(413, problems.too_large(max_bytes))
    return bytes(body)
