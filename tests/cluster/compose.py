"""`docker-compose.yml` brought up for a test, with faults for its containers."""

import os
import secrets
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from deploy.cluster import compose_command
from service.client import Client
from service.local.host import choose_ports

ROOT = Path(__file__).parents[2]
UP_SECONDS = 3_000
DOWN_SECONDS = 300
CALL_SECONDS = 60
PROJECT = "syncbn-test"
IMAGE_TAG = "test"
"""Tag of the images of the tests, which leave those of `make up-cluster` alone."""


class ComposeStack:
    """The product on containers, in a project of the tests."""

    def __init__(self, folder, *files):
        self.engine = "docker" if compose_command()[0] == "docker" else "podman"
        [port] = choose_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.token = secrets.token_hex(32)
        self.env_file = folder / "env"
        self.env_file.touch(0o600)
        self.env_file.write_text(
            f"SYNCBN_TOKEN={self.token}\nSYNCBN_PUBLISHED_PORT={port}\nSYNCBN_PUBLIC_URL={self.url}\n"
            f"IMAGE_TAG={IMAGE_TAG}\n"
        )
        self.files = files

    def up(self):
        """Bring everything up, and wait until it is ready."""
        self._cluster("up", UP_SECONDS)

    def down(self):
        """Take everything down, with its volumes."""
        self._cluster("down", DOWN_SECONDS, "--volumes")

    def _cluster(self, action, seconds, *options):
        files = [f"--file={file}" for file in self.files]
        command = [sys.executable, ROOT / "deploy/cluster.py", action, f"--env-file={self.env_file}"]
        environment = os.environ | {"COMPOSE_PROJECT_NAME": PROJECT}
        run = subprocess.run(
            [*command, *files, *options], env=environment, capture_output=True, text=True, timeout=seconds
        )
        assert run.returncode == 0, (run.stdout + run.stderr)[-2_000:] + self.last_lines()

    def last_lines(self):
        """Return the end of each container's log."""
        names = self.containers(stopped=True)
        return "".join(f"\n== {name}\n{self.logs(name)[-1_500:]}" for name in names)

    def call(self, *arguments, check=True, seconds=CALL_SECONDS):
        """Run a command of the container engine and return its output."""
        command = [self.engine, *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        assert run.returncode == 0 or not check, f"{command}: {run.stderr}"
        return run.stdout.strip()

    def logs(self, name):
        """Return what a container has printed."""
        command = [self.engine, "logs", name]
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=CALL_SECONDS
        )
        return run.stdout

    def client(self):
        return Client(self.url, self.token)

    def containers(self, service=None, *, stopped=False):
        """Return the names of a service's containers, or of all, in order."""
        labels = [f"--filter=label=com.docker.compose.project={PROJECT}"]
        if service:
            labels.append(f"--filter=label=com.docker.compose.service={service}")
        listed = self.call("ps", *(["--all"] if stopped else []), *labels, "--format={{.Names}}")
        return sorted(listed.split())

    def container(self, service):
        return self.containers(service, stopped=True)[0]

    def inspect(self, name, template):
        return self.call("inspect", "--format", template, name)

    def python(self, name, code, *arguments, check=True):
        """Run Python in a container and return its output."""
        return self.call("exec", name, "python", "-c", code, *arguments, check=check)

    def processes(self, name):
        """Return the command lines of a container's processes by their ids on this machine."""
        lines = self.call("top", name, "hpid", "args").splitlines()[1:]
        return {int(line.split(None, 1)[0]): line.split(None, 1)[1] for line in lines}

    def kill(self, name):
        """Kill a container with SIGKILL; it stays down until it is started."""
        self.call("kill", "--signal=KILL", name)
        deadline = time.monotonic() + 10
        while self.inspect(name, "{{.State.Status}}") == "running":
            assert time.monotonic() < deadline, name
            time.sleep(0.1)

    def start(self, name):
        self.call("start", name)

    def until_ready(self, seconds=180):
        """Wait until `/readyz` answers 200 and the CPUs of both nodes are there."""
        deadline, last = time.monotonic() + seconds, None
        with self.client() as client:
            while True:
                try:
                    last = client.ready()
                    if last.ready and client.cluster().total.cpus >= 4:
                        return
                except Exception as error:
                    last = error
                assert time.monotonic() < deadline, last
                time.sleep(1)

    @contextmanager
    def cut_off(self, name):
        """Cut a container off its networks."""
        inside = ["nsenter", "--target", self.inspect(name, "{{.State.Pid}}"), "--net", "ip", "link", "set"]
        subprocess.run([*inside, "eth0", "down"], check=True, timeout=10)
        try:
            yield
        finally:  # without effect if the container has ended meanwhile
            subprocess.run([*inside, "eth0", "up"], check=False, timeout=10)

    @contextmanager
    def slowed_down(self, name, cpus):
        """Limit the processor time of a container."""
        period = 100_000
        identifier = self.inspect(name, "{{.Id}}")

        def limit(quota):
            if self.engine == "docker":
                self.call("update", f"--cpu-period={period}", f"--cpu-quota={quota}", name)
            else:  # older versions of podman have no `update`
                options = [f"--cpu-period={period}", f"--cpu-quota={quota}"]
                subprocess.run(["runc", "update", *options, identifier], check=True, timeout=10)

        limit(int(cpus * period))
        try:
            yield
        finally:
            limit(-1)
