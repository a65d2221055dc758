"""Containers of the chart as processes, in a network of their own and on a read-only root.

`test_pods.py` runs this module inside new namespaces, where nothing outside of /tmp and /dev/shm can be
written.
"""

import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx

from tests.deploy.test_helm import documents_of, find, templates_of

PROGRAMS = Path(sys.executable).parent
SECRETS = {
    "api-token": "a" * 20,
    "metrics-token": "p" * 20,
    "mlflow-secret": "m" * 20,
    "ray-token": "r" * 20,
    "password": "unused",
}
GROUP = {"name": "cpu", "cpus": 2, "memory": "4Gi", "minReplicas": 0, "maxReplicas": 1}
PROBE_SECONDS, JOB_SECONDS, MAX_RESTARTS = 300, 300, 2
NODE_SECONDS = 70
"""Time until a node is there; Ray Train gives up after 60 s unless the chart says otherwise."""
SPEC = {"model": {"name": "mlp", "hidden": [8]}, "data": {"name": "digits"}, "steps": 20, "num_workers": 2}


class Pods:
    """Processes by the name of their container's pod."""

    def __init__(self):
        self.documents = documents_of({"ray": {"workerGroups": [GROUP]}, "mlflow": {"workers": 1}})
        self.templates = dict(templates_of(self.documents))
        self.processes = {}
        self.commands = {}
        self.restarts = []

    def container(self, name):
        return self.templates[name]["spec"]["containers"][0]

    def start(self, name, command, **changes):
        self.commands[name] = partial(self.start, name, command, **changes)
        variables = {
            one["name"]: one.get("value")
            or SECRETS.get(one["valueFrom"].get("secretKeyRef", {}).get("key"), "pod-0")
            for one in self.container(name)["env"]
        }
        environment = os.environ | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"} | variables | changes
        with Path(f"/tmp/{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [PROGRAMS / command[0], *command[1:]], env=environment, stdout=log, stderr=log, cwd="/tmp"
            )

    def wait_for(self, name, probe="readinessProbe"):
        """Wait until a probe of the container succeeds.

        A container that ends before is started again, as by Kubernetes: on a machine with a high load, Ray's
        head ends when its own parts do not find each other in time.
        """
        container = self.container(name)
        (target,) = (container[probe][kind] for kind in ("httpGet", "tcpSocket") if kind in container[probe])
        (port,) = [one["containerPort"] for one in container["ports"] if one["name"] == target["port"]]
        deadline = time.monotonic() + PROBE_SECONDS
        while True:
            log = Path(f"/tmp/{name}.log").read_text()
            assert time.monotonic() < deadline, log
            if self.processes[name].poll() is not None:
                assert len(self.restarts) < MAX_RESTARTS, log
                self.restarts.append(name)
                self.commands[name]()
            try:
                if "path" in target:
                    httpx.get(f"http://127.0.0.1:{port}{target['path']}", timeout=15).raise_for_status()
                else:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                return
            except (httpx.HTTPError, OSError):
                time.sleep(0.5)

    def start_head(self):
        group = find(self.documents, "RayCluster", "demo-syncbn")["spec"]["headGroupSpec"]
        options = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        command = ["ray", "start", "--head", "--block", *options, "--metrics-export-port=8080"]
        self.start(
            "head", command, RAY_raylet_start_wait_time_s="120"
        )  # Ray's 30 s are short on a busy machine

    def start_worker(self):
        # Ports of the head are taken, because both share one address here.
        ports = ["--dashboard-agent-listen-port=62365", "--metrics-export-port=8081"]
        address = "--address=127.0.0.1:6379"
        command = ["ray", "start", "--block", address, f"--num-cpus={GROUP['cpus']}", *ports]
        self.start("cpu", command, RAY_raylet_start_wait_time_s="120")

    def start_mlflow(self):
        changes = {
            "--backend-store-uri": "sqlite:////tmp/mlflow.db",
            "--artifacts-destination": "/tmp/artifacts",
            "--allowed-hosts": "127.0.0.1:*",
        }
        given = [argument.partition("=") for argument in self.container("demo-syncbn-mlflow")["args"]]
        command = [f"{name}{sign}{changes.get(name, value)}" for name, sign, value in given]
        self.start("demo-syncbn-mlflow", command)

    def start_checker(self):
        self.start("demo-syncbn-checker", self.container("demo-syncbn-checker")["args"])

    def start_api(self):
        self.start(
            "demo-syncbn-api",
            self.container("demo-syncbn-api")["args"],
            SYNCBN_DATABASE_URL="sqlite+aiosqlite:////tmp/service.db",
            SYNCBN_STORAGE="/tmp/storage",
            SYNCBN_RAY_ADDRESS="http://127.0.0.1:8265",
            SYNCBN_MLFLOW_URL="http://127.0.0.1:5000",
            SYNCBN_CLUSTER_URL="http://127.0.0.1:8000",
            SYNCBN_CHECKER="127.0.0.1:7000",
            SYNCBN_CHECK_SECONDS="60",
        )

    def stop(self):
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def refuse_unknown_model():
    """Submit a model that only the checker can know not to exist."""
    spec = SPEC | {"model": {"name": "torchvision:resnet1"}}
    headers = {"Authorization": f"Bearer {SECRETS['api-token']}"}
    refused = httpx.post(
        "http://127.0.0.1:8000/v1/jobs", json={"name": "unknown", "spec": spec}, headers=headers, timeout=90
    )
    assert refused.status_code == 422, refused.text
    assert "resnet1" in refused.text


def train(pods):
    """Submit a job while the cluster has no worker, add one later, and return the job's end."""
    headers = {"Authorization": f"Bearer {SECRETS['api-token']}"}
    with httpx.Client(base_url="http://127.0.0.1:8000", headers=headers, timeout=30) as client:
        job = client.post("/v1/jobs", json={"name": "first", "spec": SPEC}).json()
        began = time.monotonic()
        while job["state"] not in ("succeeded", "failed"):
            waited = time.monotonic() - began
            assert waited < JOB_SECONDS, job
            if waited > NODE_SECONDS and "cpu" not in pods.processes:
                pods.start_worker()
            time.sleep(1)
            job = client.get(f"/v1/jobs/{job['id']}").json()
        return job


def main():
    try:
        Path("/written").touch()
        raise AssertionError("the root can be written")
    except OSError:
        pass
    pods = Pods()
    try:
        pods.start_head()
        pods.wait_for("head")
        pods.wait_for("head", "livenessProbe")
        pods.start_mlflow()
        pods.start_checker()
        pods.wait_for("demo-syncbn-mlflow")
        pods.wait_for("demo-syncbn-checker")
        pods.start_api()
        pods.wait_for("demo-syncbn-api", "livenessProbe")
        pods.wait_for("demo-syncbn-api")
        assert httpx.get("http://127.0.0.1:8265/api/jobs/").status_code == 401
        refuse_unknown_model()
        job = train(pods)
        print(f"{job['state']}, attempt {job['attempt']}: {job['reason']}")
    finally:
        pods.stop()


if __name__ == "__main__":
    main()
