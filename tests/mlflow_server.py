"""Real MLflow server without Ray, as the stack runs it."""

import os
import subprocess
import time
from contextlib import contextmanager

import httpx

from service.local.host import choose_ports
from service.local.processes import Layout, mlflow_server

SECRET = "0123456789abcdef-mlflow"
START_TIMEOUT_SECONDS = 120


@contextmanager
def serving_mlflow(folder):
    """Run the server; yield its address and secret."""
    api_port, mlflow_port = choose_ports(2)
    layout = Layout(
        data_dir=folder,
        ray_dir=folder,
        ray_token_path=folder / "token",
        api_token="unused",
        mlflow_secret=SECRET,
        cpus=1,
        api_port=api_port,
        mlflow_port=mlflow_port,
        ray_port=0,
        ray_client_port=0,
    )
    specification = mlflow_server(layout)
    with (folder / "mlflow.log").open("w") as log:
        process = subprocess.Popen(
            specification.command,
            env=os.environ | specification.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_healthy(process, layout.mlflow_url, folder / "mlflow.log")
            yield layout.mlflow_url, SECRET
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_healthy(process, url, log):
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
