"""MLflow server that requires a shared secret.

`mlflow server --app-name syncbn` runs this application (an `mlflow.app` entry point) in place of MLflow's
own. It wraps all of MLflow's routes, those of its assistant, gateway and job execution included, so that none
of them can be reached without the secret. The service is the only holder of the secret: see
`service.api.mlflow_proxy` for what it forwards.
"""

import hmac
import os

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

SECRET_VARIABLE = "SYNCBN_MLFLOW_SECRET"  # noqa: S105 - the name of a variable
MIN_SECRET_LENGTH = 16
HEALTH_PATH = "/health"


class SecretRequired:
    """ASGI middleware that answers 401 without `Authorization: Bearer <secret>`.

    `GET /health`, which answers "OK" and nothing else, is open for health checks. WebSockets are closed.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self._app, self._expected = app, f"Bearer {secret}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        given = Headers(scope=scope).get("authorization", "").encode()
        is_health_check = scope["method"] == "GET" and scope["path"] == HEALTH_PATH
        if not (is_health_check or hmac.compare_digest(given, self._expected)):
            answer = PlainTextResponse(
                "MLflow is reached through the service, under /mlflow/", 401, {"WWW-Authenticate": "Bearer"}
            )
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def create_app() -> ASGIApp:
    """Create MLflow's application behind SYNCBN_MLFLOW_SECRET. Raises ValueError."""
    secret = os.environ.pop(SECRET_VARIABLE, "")
    if len(secret) < MIN_SECRET_LENGTH:
        raise ValueError(
            f"{SECRET_VARIABLE}: must have at least {MIN_SECRET_LENGTH} characters (got {len(secret)})"
        )
    from mlflow.server.fastapi_app import app

    return SecretRequired(app, secret)
