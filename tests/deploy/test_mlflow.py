"""MLflow as the chart starts it: its command and probe, on PostgreSQL."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from service.local.host import choose_ports
from tests.deploy.test_helm import documents_of, find
from tests.service.databases import postgresql_server

SECRET = "0123456789abcdef-mlflow"
START_TIMEOUT_SECONDS = 120


@pytest.mark.slow
def test_mlflow_starts_on_postgresql_and_answers_its_probe(tmp_path):
    with postgresql_server() as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        database = {
            "host": "127.0.0.1",
            "port": port,
            "name": "postgres",
            "user": "test",
            "sslMode": "disable",
        }
        documents = documents_of({"mlflow": {"workers": 1, "database": database}})
        deployment = find(documents, "Deployment", "demo-syncbn-mlflow")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (listening,) = choose_ports(1)
        changes = {
            "mlflow": str(Path(sys.executable).with_name("mlflow")),
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={listening}",
            "--artifacts-destination=/mlflow/artifacts": f"--artifacts-destination={tmp_path}",
        }
        assert changes.keys() <= set(container["args"])
        command = [changes.get(argument, argument) for argument in container["args"]]
        variables = {one["name"]: one.get("value", SECRET) for one in container["env"]}
        process = subprocess.Popen(
            command, env=os.environ | variables | {"HOME": str(tmp_path)}, cwd=tmp_path
        )
        try:
            probe = container["readinessProbe"]["httpGet"]
            with httpx.Client(base_url=f"http://127.0.0.1:{listening}") as client:
                wait_until_healthy(process, client, probe["path"])
                create = {"url": "/api/2.0/mlflow/experiments/create", "json": {"name": "on-postgresql"}}
                headers = {"Host": "demo-syncbn-mlflow:5000"}
                assert client.post(**create, headers=headers).status_code == 401
                headers |= {"Authorization": f"Bearer {SECRET}"}
                created = client.post(**create, headers=headers)
                assert created.status_code == 200, created.text
                found = client.get(
                    "/api/2.0/mlflow/experiments/get-by-name?experiment_name=on-postgresql",
                    headers=headers | {"Host": "evil.example"},
                )
                assert found.status_code == 403
        finally:
            process.terminate()
            process.wait(30)


def wait_until_healthy(process, client, path):
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            client.get(path).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
