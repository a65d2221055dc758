"""Arbitrary input: no request causes a server error or bypasses a check by its spelling.

Examples are derived from the tests themselves, so that a failure is reproducible on every machine.
"""

import asyncio
import json
import socket
import threading
from contextlib import closing, contextmanager
from urllib.parse import unquote

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api.app import make_app
from service.api.server import Server
from service.domain.mlflow_access import is_readable
from service.local.host import choose_ports
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay
from trainer.jobspec import JobSpec, read_yaml

TOKEN = "0123456789abcdef-test"
KEY = f"Authorization: Bearer {TOKEN}\r\n"
fuzz = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def in_thread(server):
    """Run a server in a thread."""
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield
    server.should_exit = True
    thread.join(20)


class Upstream:
    """Upstream in place of MLflow that records requests."""

    def __init__(self):
        self.seen = []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return
        self.seen.append((scope["method"], scope["raw_path"].decode(), dict(scope["headers"])))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"set-cookie", b"x=1")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def upstream():
    return Upstream()


@pytest.fixture(scope="module")
def port(tmp_path_factory, upstream):
    folder = tmp_path_factory.mktemp("service")
    port, upstream_port = choose_ports(2)
    config = uvicorn.Config(upstream, port=upstream_port, log_level="error", lifespan="off")
    settings = Settings(
        token=TOKEN,
        port=port,
        database_url=f"sqlite+aiosqlite:///{folder}/test.db",
        storage=folder / "storage",
        mlflow_url=f"http://127.0.0.1:{upstream_port}",
        mlflow_secret="the-secret-of-mlflow",
        check_seconds=0,
        rate_per_second=100_000,
        rate_burst=100_000,
    )
    server = Server(make_app(settings, FakeRay(is_down=True), FakeMlflow()), settings)
    with in_thread(uvicorn.Server(config)), in_thread(server):
        yield port


@pytest.fixture(scope="module")
def client(port):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30) as client:
        yield client


def send(port, request):
    """Send bytes on a new connection; return the status, or None if the connection is closed."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=15)) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else None


PIECES = st.sampled_from(
    [
        "ajax-api", "api", "2.0", "3.0", "mlflow", "assistant", "config", "runs", "get", "search", "delete",
        "log-batch", "experiments", "create", "static-files", "x.js", "mlflow-artifacts", "artifacts",
        "graphql", "get-artifact", "..", ".", "", "%2e%2e", "%2E.", "%252e%252e", "%2f", "%5c", "\\", "%00",
        "%0a", ";", "..;", "%c0%ae", "%", "ü", " ",
    ]
)  # fmt: skip


@fuzz
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]),
    pieces=st.lists(PIECES, max_size=8),
    separator=st.sampled_from(["/", "//", "%2f", "/./"]),
)
def test_no_spelling_of_a_path_gets_past_the_proxy(port, upstream, method, pieces, separator):
    upstream.seen.clear()
    path = "/mlflow/" + separator.join(pieces)
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\n{KEY}Cookie: syncbn_session=1\r\nConnection: close\r\n\r\n"
    )
    status = send(port, request.encode(errors="ignore"))
    assert status is None or status < 500
    for seen_method, raw_path, headers in upstream.seen:
        decoded = unquote(raw_path)
        assert unquote(decoded) == decoded  # decoding twice, as some servers do, leads nowhere else
        assert is_readable(seen_method, decoded)
        assert not {"..", "."} & set(decoded.split("/"))
        assert headers[b"authorization"] == b"Bearer the-secret-of-mlflow"
        assert b"cookie" not in headers


@fuzz
@given(st.binary(max_size=60).filter(lambda value: b"\r" not in value and b"\n" not in value))
def test_arbitrary_tokens_are_rejected(port, value):
    for scheme in (b"Bearer ", b"bearer  ", b"Basic ", b""):
        request = (
            b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: "
            + scheme
            + value
            + b"\r\n\r\n"
        )
        assert send(port, request) in (None, 400, 401, 429)


HEADERS = [
    "Idempotency-Key", "If-Match", "If-None-Match", "Last-Event-ID", "Content-Type", "Content-Length", "Host",
    "Transfer-Encoding", "Expect", "Upgrade", "Connection", "X-Forwarded-For", "Accept", "Range", "Cookie",
]  # fmt: skip


@fuzz
@given(
    name=st.sampled_from(HEADERS),
    value=st.one_of(
        st.binary(max_size=300),
        st.sampled_from([b"0", b"-1", b"9" * 21, b"chunked", b"websocket, *", b"1:" + b"9" * 15]),
    ).filter(lambda value: b"\r" not in value and b"\n" not in value),
)
def test_arbitrary_headers_cause_no_server_error(port, client, name, value):
    jobs = client.get("/v1/jobs").json()["jobs"] or [
        client.post("/v1/jobs", json={"name": "x", "spec": {"steps": 1}}).json()
    ]
    for method, path in (
        ("POST", "/v1/jobs"),
        ("GET", f"/v1/jobs/{jobs[0]['id']}"),
        ("GET", f"/v1/jobs/{jobs[0]['id']}/logs"),
        ("GET", "/mlflow/version"),
    ):
        request = (
            f"{method} {path} HTTP/1.1\r\n{KEY}".encode() + name.encode() + b": " + value + b"\r\n\r\n{}"
        )
        status = send(port, request)
        assert status is None or status < 500, (method, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def encoded(content):
    return json.dumps(content, ensure_ascii=True).encode()


@fuzz
@given(
    path=st.sampled_from(
        [
            "/v1/jobs",
            "/v1/jobs:validate",
            "/v1/comparisons",
            "/v1/comparisons:validate",
            "/v1/tokens",
            "/v1/webhooks",
            "/v1/sign-in-links",
            "/v1/jobs/job-0:clone",
            "/v1/jobs/job-0:resume",
            "/v1/jobs/job-0:cancel",
        ]
    ),
    body=st.one_of(st.binary(max_size=200), JSON.map(encoded)),
)
def test_arbitrary_bodies_cause_no_server_error(client, path, body):
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (201, 202, 400, 404, 409, 422), answer.text


FIELDS = sorted(JobSpec.model_fields)
SPECS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4)


@fuzz
@given(SPECS, st.integers(1, 2**70))
def test_arbitrary_specs_cause_no_server_error_and_accepted_ones_round_trip(client, spec, steps):
    body = encoded({"name": "x", "spec": {"steps": steps} | spec})
    answer = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (202, 400, 422), answer.text
    if answer.status_code == 202:
        assert client.get(f"/v1/jobs/{answer.json()['id']}").json()["spec"] == answer.json()["spec"]


TAGS = ("binary", "bool", "float", "int", "merge", "null", "omap", "pairs", "set", "timestamp", "value")
YAML_PARTS = (
    *(f"!!{tag} " for tag in TAGS),
    *(
        "a",
        ": ",
        "\n",
        "- ",
        "? ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        '""',
        "=",
        "0b_",
        "0x",
        "1",
        "0",
        "_",
        ".",
        "-",
        "+",
        ":59",
    ),
    *("2001-01-01", "0001-01-01", "-99-99", " 00:00:00", " +99:00", "9" * 5_000, ":00" * 300, "f" * 5_000),
)
"""Components of values of each kind, valid and invalid."""


@fuzz
@given(
    st.binary(max_size=300)
    | st.text(alphabet="&*{}[]:,-<>!|#%@ \n\tab12'\"", max_size=200).map(str.encode)
    | st.lists(st.sampled_from(YAML_PARTS), max_size=12).map("".join).map(str.encode)
)
def test_arbitrary_files_are_read_or_rejected_by_name(tmp_path, content):
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    try:
        read_yaml(path)
    except ValueError as error:
        assert str(path) in str(error)


@fuzz
@given(st.text(max_size=50), st.text(max_size=30))
def test_arbitrary_addresses_cause_no_server_error(client, path, query):
    for prefix in ("/v1/jobs/", "/v1/comparisons/", "/v1/tokens/", "/mlflow/", "/sign-in", "/"):
        try:
            answer = client.get(
                httpx.URL("http://x", path=prefix + path, query=query.encode()).raw_path.decode()
            )
        except (httpx.InvalidURL, ValueError):
            continue
        assert answer.status_code < 500, answer.text
