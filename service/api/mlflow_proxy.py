"""Reverse proxy to MLflow under `/mlflow/`, the only way to it from outside.

Browsers come with a session, programs with a token of scope read, and both may read. Attempts come with a credential of their own
and may write to their run. `service.domain.mlflow_access` decides what is forwarded; bodies are streamed in both directions.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import httpx
from cachetools import TTLCache
from fastapi import HTTPException, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.adapters.mlflow_http import RETURNED_HEADERS, Kind, MlflowHttp
from service.api.auth import authenticate, bearer, caller_of_session, limit_rate
from service.api.components import components_of
from service.api.compute import in_thread
from service.api.sign_in import sign_in_page
from service.domain.errors import InvalidField, NotFound
from service.domain.mlflow_access import MAX_JSON_BYTES, Grant, is_clean, is_readable, of_attempt

PREFIX = "/mlflow"
UPLOADS = f"{PREFIX}/api/2.0/mlflow-artifacts/"
MAX_UPLOAD_BYTES = 20_000_000_000
"""One artifact of an attempt."""
MAX_READS, MAX_UPLOADS = 16, 4
"""Of one token, and of one job's attempt, at the same time."""
PAGES_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
ARTIFACT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Of files that user code has written: scripts in them do not run as pages of this service."""
ARTIFACT_PATHS = ("/get-artifact", "/ajax-api/2.0/mlflow-artifacts/", "/api/2.0/mlflow-artifacts/")


class Slots:
    """Requests that each caller may have under way at the same time."""

    def __init__(self, maximum: int) -> None:
        self._maximum, self._taken = maximum, Counter[str]()

    def take(self, name: str) -> Callable[[], None]:
        """Take a slot; return the function that gives it back. Raises HTTPException with 429."""
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
    """MLflow's answer as it comes; however it ends, the connection to MLflow and the caller's slot are free afterwards."""

    def __init__(self, answer: httpx.Response, path: str, release: Callable[[], None]) -> None:
        self._answer, self._release = answer, release
        headers = {name: answer.headers[name] for name in RETURNED_HEADERS if name in answer.headers}
        is_artifact = path.startswith(ARTIFACT_PATHS) or path.endswith("/artifacts/files")
        headers["Content-Security-Policy"] = ARTIFACT_POLICY if is_artifact else PAGES_POLICY
        headers["X-Frame-Options"] = "SAMEORIGIN"  # MLflow's page shows some of its own in frames
        super().__init__(answer.aiter_raw(), answer.status_code, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, to the end or to the caller's."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
            await self._answer.aclose()


class MlflowProxy:
    """Decides on each request under `/mlflow/` and forwards it."""

    def __init__(self) -> None:
        self._readers, self._uploads = Slots(MAX_READS), Slots(MAX_UPLOADS)
        self._owned: TTLCache[tuple[str, str], bool] = TTLCache(1_000, 600)
        """Run and model; a model's run never changes."""

    async def forward(self, request: Request) -> Response:
        """Forward one request. Raises HTTPException with 401, 403, 413 or 429, InvalidField, NotFound and Unavailable."""
        path = request.scope["path"].removeprefix(PREFIX)
        if not path:  # the page's own addresses are relative to the folder
            return RedirectResponse(f"{PREFIX}/")
        if not is_clean(path):
            raise InvalidField(
                "path", path, "must not have empty or relative parts, backslashes or encoded percent signs"
            )
        credentials = await bearer(request)
        components = components_of(request)
        grant = await components.credentials.find_grant(credentials.credentials) if credentials else None
        if grant is not None:
            limit_rate(components, f"attempt of {grant.job_id}")
            return await self._forward_attempt(request, components.mlflow_http, grant, path)
        caller = await (authenticate(request) if credentials else caller_of_session(request))
        if caller is None:
            if request.method == "GET" and path == "/":
                return sign_in_page(status=401)
            raise HTTPException(401, "sign in at /sign-in, or send a token", headers={"WWW-Authenticate": "Bearer"})
        if not is_readable(request.method, path):
            raise HTTPException(403, f"{request.method} {path} is not forwarded to MLflow")
        body = await _read(request) if request.method == "POST" else None
        release = self._readers.take(caller.token_id)
        return await self._send(
            components.mlflow_http, request.method, path, release,
            query=request.url.query, headers=dict(request.headers), content=body,
        )  # fmt: skip

    async def _forward_attempt(self, request: Request, mlflow: MlflowHttp, grant: Grant, path: str) -> Response:
        is_upload = request.method == "PUT"
        body = b"" if is_upload else await _read(request)
        forwarded = await in_thread(of_attempt, grant, request.method, path, dict(request.query_params), body)
        if forwarded is None:
            raise HTTPException(403, f"{request.method} {path} is not open to the attempt of a job")
        if forwarded.model_id is not None and not await self._owns_model(mlflow, grant, forwarded.model_id):
            raise NotFound(f"the run of this attempt has no logged model {forwarded.model_id!r}")
        headers = dict(request.headers)
        if not is_upload:
            headers = {name: value for name, value in headers.items() if not name.startswith("content-")}
        content: bytes | AsyncIterator[bytes] | None = request.stream() if is_upload else None
        if forwarded.body is not None:  # as escapes of ASCII, for text may hold half a surrogate pair
            headers["content-type"], content = "application/json", json.dumps(forwarded.body).encode()
        release = self._uploads.take(grant.job_id) if is_upload else _nothing
        kind = Kind.UPLOAD if is_upload else Kind.METRICS
        return await self._send(
            mlflow, request.method, path, release, query=forwarded.query, headers=headers, content=content, kind=kind
        )

    async def _send(
        self, mlflow: MlflowHttp, method: str, path: str, release: Callable[[], None], **arguments: Any
    ) -> Response:
        try:
            answer = await mlflow.send(method, quote(path), **arguments)
        except BaseException:
            release()
            raise
        return ForwardedAnswer(answer, path, release)

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


async def _read(request: Request) -> bytes:
    """Read a body of at most MAX_JSON_BYTES."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_JSON_BYTES:
            raise HTTPException(413)
    return bytes(body)
