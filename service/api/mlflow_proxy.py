"""Reverse proxy to MLflow under `/mlflow/`, the only way to it from outside.

Browsers come with a session, programs with a token of scope read, and both may read. Attempts come with a credential of their own
and may write to their run. `service.domain.mlflow_access` decides what is forwarded; bodies are streamed in both directions.
"""

from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx
from cachetools import TTLCache
from fastapi import HTTPException, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from starlette.background import BackgroundTask

from service.adapters.mlflow_http import RETURNED_HEADERS, MlflowHttp
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
PAGES_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
ARTIFACT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Of files that user code has written: scripts in them do not run as pages of this service."""
ARTIFACT_PATHS = ("/get-artifact", "/ajax-api/2.0/mlflow-artifacts/", "/api/2.0/mlflow-artifacts/")


async def proxy_mlflow(request: Request) -> Response:
    """Forward one request. Raises HTTPException with 401, 403, 404, 413 or 429, InvalidField and Unavailable."""
    path = request.scope["path"].removeprefix(PREFIX)
    if not path:  # the page's own addresses are relative to the folder
        return RedirectResponse(f"{PREFIX}/")
    if not is_clean(path):
        raise InvalidField("path", path, "must not have empty or relative parts, backslashes or encoded percent signs")
    credentials = await bearer(request)
    components = components_of(request)
    grant = await components.credentials.find_grant(credentials.credentials) if credentials else None
    if grant is not None:
        limit_rate(components, f"attempt of {grant.job_id}")
        return await _forward_attempt(request, components.mlflow_http, grant, path)
    if credentials is not None:
        await authenticate(request)
    elif await caller_of_session(request) is None:
        if request.method == "GET" and path == "/":
            return sign_in_page(status=401)
        raise HTTPException(401, "sign in at /sign-in, or send a token", headers={"WWW-Authenticate": "Bearer"})
    if not is_readable(request.method, path):
        raise HTTPException(403, f"{request.method} {path} is not forwarded to MLflow")
    body = await _read(request) if request.method == "POST" else None
    answer = await components.mlflow_http.send(
        request.method,
        quote(path),
        query=request.url.query,
        headers=dict(request.headers),
        content=body,
    )
    return _answer(answer, path)


async def _forward_attempt(request: Request, mlflow: MlflowHttp, grant: Grant, path: str) -> Response:
    is_upload = request.method == "PUT"
    body = b"" if is_upload else await _read(request)
    forwarded = await in_thread(of_attempt, grant, request.method, path, dict(request.query_params), body)
    if forwarded is None:
        raise HTTPException(403, f"{request.method} {path} is not open to the attempt of a job")
    if forwarded.model_id is not None and not await _owns_model(mlflow, grant, forwarded.model_id):
        raise NotFound(f"the run of this attempt has no logged model {forwarded.model_id!r}")
    headers = {name: value for name, value in request.headers.items() if is_upload or not name.startswith("content-")}
    answer = await mlflow.send(
        request.method,
        quote(path),
        query=forwarded.query,
        headers=headers,
        content=request.stream() if is_upload else None,
        json=forwarded.body,
        of_attempt=True,
    )
    return _answer(answer, path)


_OWNED_MODELS: TTLCache[tuple[str, str], bool] = TTLCache(1_000, 600)
"""Run and model; a model's run never changes."""


async def _owns_model(mlflow: MlflowHttp, grant: Grant, model_id: str) -> bool:
    if (grant.run_id, model_id) not in _OWNED_MODELS:
        found = await mlflow.get_json(f"/api/2.0/mlflow/logged-models/{model_id}")
        info = ((found or {}).get("model") or {}).get("info") or {}
        if info.get("source_run_id") != grant.run_id:
            return False
        _OWNED_MODELS[grant.run_id, model_id] = True
    return True


async def _read(request: Request) -> bytes:
    """Read a body of at most MAX_JSON_BYTES."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_JSON_BYTES:
            raise HTTPException(413)
    return bytes(body)


def _answer(answer: httpx.Response, path: str) -> Response:
    headers = {name: answer.headers[name] for name in RETURNED_HEADERS if name in answer.headers}
    is_artifact = path.startswith(ARTIFACT_PATHS)
    headers["Content-Security-Policy"] = ARTIFACT_POLICY if is_artifact else PAGES_POLICY
    # MLflow's page loads its own parts by requests that browsers mark as its own.
    headers["X-Frame-Options"] = "SAMEORIGIN"
    return StreamingResponse(
        _parts(answer), answer.status_code, headers=headers, background=BackgroundTask(answer.aclose)
    )


async def _parts(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()
