import httpx
import pytest

from tests.service.api.conftest import TOKEN


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic dGVzdDp0ZXN0", "0123456789abcdef-test", "Bearer ü"]
)
async def test_every_v1_call_needs_the_token(anonymous, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in [
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs/x/logs"),
        ("GET", "/v1/comparisons/x/report"),
    ]:
        answer = await anonymous.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"


async def test_every_v1_operation_is_behind_the_token(anonymous):
    paths = (await anonymous.get("/openapi.json")).json()["paths"]
    open_to_all = {
        path
        for path, methods in paths.items()
        for operation in methods.values()
        if "security" not in operation
    }
    assert open_to_all == {"/livez", "/readyz"}


async def test_the_api_docs_are_served(anonymous):
    assert "swagger" in (await anonymous.get("/docs")).text.lower()


async def test_internal_errors_are_problem_details(app):
    app.state.components.jobs.page = None
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "NoneType" not in answer.text
