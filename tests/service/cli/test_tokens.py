"""`syncbn token` with a real API in this process, through a real socket."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import pytest

from service.client import ApiError, Client
from service.local.host import choose_ports
from tests.service.running_api import TOKEN


def test_tokens_are_created_listed_and_revoked(url, syncbn):
    def run(*arguments):
        code, stdout, stderr = syncbn("token", *arguments)
        assert code == 0, stderr
        return stdout

    made = run("create", "ann", "--scope", "submit", "--name", "laptop", "--expires-days", "90")
    assert made.startswith("syncbn_")
    assert made.count("\n") == 1
    token = json.loads(run("create", "bob", "--scope", "read", "--json"))
    assert (token["owner"], token["scopes"], token["expires_at"]) == ("bob", ["read"], None)
    secret = made.strip()
    with Client(url, secret) as ann:
        me = ann.me()
        assert (me.owner, me.scopes) == ("ann", ["submit"])
        with pytest.raises(ApiError, match="scope admin"):
            list(ann.tokens())
        table, listed = run("list"), json.loads(run("list", "--json"))
        assert [each["owner"] for each in listed] == ["bob", "ann", "admin"]
        assert "laptop" in table
        assert secret not in table + json.dumps(listed)
        assert run("revoke", me.token_id) == f"{me.token_id}: revoked\n"
        with pytest.raises(ApiError, match="valid token"):
            ann.me()
    with Client(url, TOKEN) as admin:
        assert [record.action for record in admin.audit(page_size=2)] == [
            "token.revoke",
            *["token.create"] * 3,
        ]
    assert "token.revoke" in run("audit")
    assert len(json.loads(run("audit", "--limit", "1000", "--json"))) == 4  # more than the maximum page size
    assert [record["subject"] for record in json.loads(run("audit", "--limit", "1", "--json"))] == [
        me.token_id
    ]
    assert "of admin: admin" in run("me")


def serve(tmp_path, port):
    """Run `syncbn serve` until it answers; return its output and its log."""
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


def test_the_first_start_prints_the_token_only_to_stdout(tmp_path):
    port = choose_ports(1)[0]
    stdout, logged = serve(tmp_path, port)
    secret = stdout.splitlines()[-1]
    assert secret.startswith("syncbn_")
    assert "Uvicorn running" in logged
    assert secret not in logged
    assert serve(tmp_path, port)[0] == ""
