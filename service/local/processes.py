"""Processes of the embedded stack: commands, environments, readiness probes.

All of them listen on 127.0.0.1 only. The stack is closed to the settings of its surroundings: `RAY_*` and
`MLFLOW_*` variables of the caller are dropped; `SYNCBN_*` ones that say how the service behaves are passed
on.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.local.host import HOST
from service.local.supervisor import ProcessSpec

OBJECT_STORE_BYTES = 200_000_000
PROBE_TIMEOUT_SECONDS = 3.0
CLOSED = (
    "SYNCBN_TOKEN",
    "SYNCBN_URL",
    "SYNCBN_DATA_DIR",
    "SYNCBN_MLFLOW_SECRET",
    "SYNCBN_PUBLIC_URL",
    "SYNCBN_CLUSTER_URL",
)
"""Environment variables that would refer to another service."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Folders and ports of a stack. Only Ray's temporary files are outside `data_dir`."""

    data_dir: Path
    ray_dir: Path
    ray_token_path: Path
    api_token: str
    mlflow_secret: str
    cpus: int
    api_port: int
    mlflow_port: int
    ray_port: int
    ray_client_port: int

    @property
    def api_url(self) -> str:
        """URL of the REST API."""
        return f"http://{HOST}:{self.api_port}"

    @property
    def mlflow_url(self) -> str:
        """URL of the MLflow server, which requires `mlflow_secret`."""
        return f"http://{HOST}:{self.mlflow_port}"

    @property
    def mlflow_public_url(self) -> str:
        """URL of MLflow's pages, through the API."""
        return f"{self.api_url}/mlflow"

    @property
    def ray_url(self) -> str:
        """URL of Ray's dashboard and job server."""
        return f"http://{HOST}:{self.ray_port}"

    def log(self, part: str) -> Path:
        """Return the log file of a process."""
        return self.data_dir / "logs" / f"{part}.log"


def ray_head(layout: Layout) -> ProcessSpec:
    """Return the process of Ray's head node.

    All ports but two are chosen by the system.
    """
    options = {
        "node-ip-address": HOST,
        "port": 0,
        "dashboard-host": HOST,
        "dashboard-port": layout.ray_port,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": layout.ray_client_port,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": layout.cpus,
        "object-store-memory": OBJECT_STORE_BYTES,
        "temp-dir": layout.ray_dir,
        "log-style": "record",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    environment = {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at SIGTERM it would wait 30 s for running jobs
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",  # of its view of used resources
        "AUTOSCALER_METRIC_PORT": "0",  # fixed numbers otherwise, which two stacks cannot share
        "DASHBOARD_METRIC_PORT": "0",
        "TMPDIR": str(layout.ray_dir),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return ProcessSpec(
        name="ray",
        command=[sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *arguments],
        # Jobs inherit it, and the service's settings are none of theirs.
        environment={
            name: value for name, value in base_environment(layout).items() if not name.startswith("SYNCBN_")
        }
        | environment,
        log=str(layout.log("ray")),
        required_children=["gcs_server", "raylet"],
    )


def mlflow_server(layout: Layout) -> ProcessSpec:
    """Return the MLflow server on SQLite, with proxied artifacts, behind a secret."""
    options = {
        "backend-store-uri": f"sqlite:///{layout.data_dir}/mlflow.db",
        "artifacts-destination": (layout.data_dir / "mlflow-artifacts").as_uri(),
        "host": HOST,
        "port": layout.mlflow_port,
        "workers": 1,
        "allowed-hosts": f"localhost:*,{HOST}:*",
        "app-name": "syncbn",
    }
    return ProcessSpec(
        name="mlflow",
        command=[
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        environment=base_environment(layout)
        | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "SYNCBN_MLFLOW_SECRET": layout.mlflow_secret},
        log=str(layout.log("mlflow")),
    )


def api_server(layout: Layout) -> ProcessSpec:
    """Return the process of the API with its dispatcher."""
    return ProcessSpec(
        name="api",
        command=[sys.executable, "-m", "service.cli.app", "serve"],
        environment=api_environment(layout),
        log=str(layout.log("api")),
        stop_seconds=5,
    )


def api_environment(layout: Layout) -> dict[str, str]:
    """Return the environment for `syncbn serve` in this stack."""
    return base_environment(layout) | {
        "SYNCBN_DATABASE_URL": f"sqlite+aiosqlite:///{layout.data_dir}/service.db",
        "SYNCBN_RAY_ADDRESS": layout.ray_url,
        "SYNCBN_MLFLOW_URL": layout.mlflow_url,
        "SYNCBN_MLFLOW_SECRET": layout.mlflow_secret,
        "SYNCBN_STORAGE": str(layout.data_dir / "storage"),
        "SYNCBN_TOKEN": layout.api_token,
        "SYNCBN_HOST": HOST,
        "SYNCBN_PORT": str(layout.api_port),
    }


def base_environment(layout: Layout) -> dict[str, str]:
    """Return the common environment, without settings that redirect Ray or MLflow."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_")) and name not in CLOSED
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    direct = ",".join(
        [HOST, "localhost", *filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy")])]
    )
    return inherited | {
        "PATH": path,  # a job's entrypoint says `python`, and means this one
        "NO_PROXY": direct,
        "no_proxy": direct,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(layout.ray_token_path),
        # Off, Ray stays on the loopback address instead of replacing it with the machine's own; on Linux it
        # does nothing else.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    }


def probes(layout: Layout, client: httpx.Client) -> dict[str, Callable[[], bool]]:
    """Return a readiness probe for each process.

    A probe may raise httpx.HTTPError while its process is not ready.
    """

    def ray() -> bool:
        # The dashboard answers some seconds before the node can run a job; the node's agent answers when it
        # can.
        jobs = client.get(f"{layout.ray_url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        agents = layout.ray_dir.glob("session_latest/dashboard_agent_listen_port_*")
        return jobs.is_success and any(
            client.get(f"http://{HOST}:{agent.read_text()}/api/local_raylet_healthz").is_success
            for agent in agents
            if not agent.suffix  # what Ray is still writing ends in .tmp, and is gone in a moment
        )

    token = layout.ray_token_path.read_text().strip()
    return {
        "ray": ray,
        "mlflow": lambda: client.get(f"{layout.mlflow_url}/health").is_success,
        "api": lambda: client.get(f"{layout.api_url}/readyz").is_success,
    }
