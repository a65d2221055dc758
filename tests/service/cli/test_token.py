"""`syncbn token` against a real API in this process, through a real socket."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from service.api.app import make_app
from service.cli.app import app as command
from service.cli.client import ApiError, Client
from service.cli.machine import choose_ports
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay

TOKEN = "0123456789abcdef-test"


@pytest.fixture
def url(tmp_path):
    settings = Settings(
        token=TOKEN, database_url=f"sqlite+aiosqlite:///{tmp_path}/test.db", storage=tmp_path / "storage"
    )
    app = make_app(settings, FakeRay(), FakeMlflow())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def test_tokens_are_made_listed_and_revoked(url):
    def run(*arguments, code=0):
        result = CliRunner().invoke(command, ["token", *arguments, "--url", url, "--token", TOKEN])
        assert result.exit_code == code, result.output
        return result

    made = run("create", "ann", "--scope", "submit", "--name", "laptop", "--expires-days", "90")
    assert made.stdout.startswith("syncbn_")
    assert made.stdout.count("\n") == 1
    token = json.loads(run("create", "bob", "--scope", "read", "--json").stdout)
    assert (token["owner"], token["scopes"], token["expires_at"]) == ("bob", ["read"], None)
    secret = made.stdout.strip()
    with Client(url, secret) as ann:
        me = ann.me()
        assert (me.owner, me.scopes) == ("ann", ["submit"])
        with pytest.raises(ApiError, match="scope admin"):
            list(ann.tokens())
        table, listed = run("list").stdout, json.loads(run("list", "--json").stdout)
        assert [each["owner"] for each in listed] == ["bob", "ann", "admin"]
        assert "laptop" in table
        assert secret not in table + json.dumps(listed)
        run("revoke", me.token_id)
        with pytest.raises(ApiError, match="valid token"):
            ann.me()
    with Client(url, TOKEN) as admin:
        assert [record.action for record in admin.audit(page_size=2)] == ["token.revoke", *["token.create"] * 3]


def serve(tmp_path, port):
    """Run `syncbn serve` until it answers, and return what it printed, and what it logged."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SYNCBN_")} | {
        "SYNCBN_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/served.db",
        "SYNCBN_STORAGE": str(tmp_path),
        "SYNCBN_PORT": str(port),
        "SYNCBN_RAY_ADDRESS": "http://127.0.0.1:1",
        "SYNCBN_MLFLOW_URL": "http://127.0.0.1:1",
    }
    command = [sys.executable, "-m", "service.cli.app", "serve"]
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as process:
        try:
            for _ in range(600):
                with suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False)
                    break
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        finally:
            process.terminate()
        return process.communicate(timeout=30)


def test_the_first_start_shows_a_token_on_standard_output_alone(tmp_path):
    port = choose_ports(1)[0]
    printed, logged = serve(tmp_path, port)
    secret = printed.splitlines()[-1]
    assert secret.startswith("syncbn_")
    assert "Uvicorn running" in logged
    assert secret not in logged
    assert serve(tmp_path, port)[0] == ""
