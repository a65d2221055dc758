import pytest
from aiohttp import web

from service.adapters.mlflow_http import Kind, MlflowHttp
from service.domain.errors import UpstreamUnavailable


@pytest.fixture
async def server():
    """Server that echoes the requests it gets."""

    async def show(request):
        answer = web.json_response({"headers": dict(request.headers), "query": request.query_string})
        answer.set_cookie("a", "b")
        return answer

    async def fail(request):
        return web.Response(status=404, text="no JSON")

    app = web.Application()
    app.add_routes([web.get("/show", show), web.get("/fail", fail)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_only_allowed_headers_and_the_secret_are_sent_and_cookies_are_dropped(server):
    http = MlflowHttp(server, "the-secret-of-mlflow", 5)
    sent = {"cookie": "c=d", "authorization": "Bearer caller", "accept": "application/json"}
    for _ in range(2):
        answer = await http.send("GET", "/show", headers=sent, query=[("a", "1"), ("a", "2")], kind=Kind.READ)
        shown = {
            name.lower(): value for name, value in (await answer.aread() and answer.json())["headers"].items()
        }
        await answer.aclose()
        assert shown["authorization"] == "Bearer the-secret-of-mlflow"
        assert shown["accept"] == "application/json"
        assert "cookie" not in shown
    assert answer.json()["query"] == "a=1&a=2"
    await http.close()


async def test_errors_have_no_json_and_a_dead_server_is_unavailable(server):
    http = MlflowHttp(server, None, 5)
    assert await http.get_json("/fail") is None
    await http.close()
    dead = MlflowHttp("http://127.0.0.1:9", None, 1)
    with pytest.raises(UpstreamUnavailable, match="MLflow did not answer"):
        await dead.get_json("/show")
    await dead.close()
