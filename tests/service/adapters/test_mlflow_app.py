import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from service.adapters.mlflow_app import SecretRequired, create_app

SECRET = "0123456789abcdef"


async def answer(request):
    return PlainTextResponse("MLflow")


async def accept(socket):
    await socket.accept()


APP = SecretRequired(
    Starlette(routes=[Route("/{path:path}", answer), WebSocketRoute("/socket", accept)]), SECRET
)


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}, {"Authorization": f"Basic {SECRET}"}],
)
async def test_no_route_answers_without_the_secret(headers):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://mlflow") as client:
        for path in ("/", "/ajax-api/3.0/mlflow/assistant/config", "/health/", "/HEALTH"):
            answered = await client.get(path, headers=headers)
            assert (answered.status_code, answered.headers["WWW-Authenticate"]) == (401, "Bearer"), path
        assert (await client.post("/health", headers=headers)).status_code == 401


async def test_with_the_secret_every_route_answers_and_health_needs_none():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://mlflow") as client:
        assert (await client.get("/", headers={"Authorization": f"Bearer {SECRET}"})).text == "MLflow"
        assert (await client.get("/health")).text == "MLflow"


def test_websockets_are_closed():
    with pytest.raises(WebSocketDisconnect), TestClient(APP).websocket_connect("/socket"):
        pass


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_the_server_does_not_start_without_a_secret(monkeypatch, secret):
    monkeypatch.delenv("SYNCBN_MLFLOW_SECRET", raising=False)
    if secret is not None:
        monkeypatch.setenv("SYNCBN_MLFLOW_SECRET", secret)
    with pytest.raises(ValueError, match=r"SYNCBN_MLFLOW_SECRET: must have at least 16 characters"):
        create_app()
