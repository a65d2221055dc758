"""Embedded stack with a real Ray, MLflow and API: two stacks at once, kills, and restarts."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen

import httpx
import psutil
import pytest

from service.local.host import short_folder
from service.local.stack import Connection, LocalStack, StackError, read_connection
from tests.processes import still_alive, wait_for_file, working_in

pytestmark = pytest.mark.e2e

STOP_LIMIT_SECONDS = 15
# Daemon that ignores SIGTERM and is unreachable by process group, session or parent.
STUBBORN_JOB = """(setsid sh -c 'trap "" TERM; sleep 300; true' &); touch job-started; sleep 300"""


@contextmanager
def syncbn_up(data_dir: Path) -> Iterator[Popen[str]]:
    """Run `syncbn up` in its own process group, as a terminal does, and wait until it is ready."""
    process = Popen(
        [sys.executable, "-m", "service.cli.app", "up", "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        with process:  # closes the pipe and waits
            pass
        assert still_alive(working_in(data_dir), STOP_LIMIT_SECONDS) == []


def wait_until_ready(process: Popen[str], data_dir: Path) -> Connection:
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if (data_dir / "connection.json").exists():
            return read_connection(data_dir)
    raise AssertionError("".join(output))


def everything_below(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def mlflow_below(process: Popen[str], data_dir: Path) -> tuple[str, str]:
    """Return the unpublished URL of MLflow's own server, and its secret."""
    commands = [below.cmdline() for below in everything_below(psutil.Process(process.pid))]
    (port,) = {
        word.removeprefix("--port=")
        for command in commands
        if "--app-name=syncbn" in command
        for word in command
        if word.startswith("--port=")
    }
    return f"http://127.0.0.1:{port}", (data_dir / "mlflow-secret").read_text()


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    addresses = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            connections = process.net_connections("inet")
            addresses |= {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN}
    return addresses


def start_stubborn_job(connection: Connection, data_dir: Path) -> None:
    token = (data_dir / "ray-token").read_text()
    answer = httpx.post(
        f"{connection.ray_address}/api/jobs/",
        json={"entrypoint": STUBBORN_JOB},
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
    )
    assert answer.is_success, answer.text
    wait_for_file(data_dir / "job-started")
    (data_dir / "job-started").unlink()


def assert_ended(everything: list[psutil.Process], data_dir: Path) -> None:
    """Assert that a stack leaves neither a process nor a file of its connection within the limit."""
    assert still_alive(everything, STOP_LIMIT_SECONDS) == []
    assert working_in(data_dir) == []
    assert not (data_dir / "connection.json").exists()
    assert not short_folder(data_dir).exists()


class MlflowRuns:
    """Runs with one artifact each, which must be found after a restart."""

    def __init__(self) -> None:
        self.logged: set[str] = set()

    def log(self, mlflow: tuple[str, str], name: str) -> None:
        url, headers = mlflow[0], {"Authorization": f"Bearer {mlflow[1]}"}
        run = {"experiment_id": "0", "run_name": name, "start_time": time.time_ns() // 1_000_000}
        created = httpx.post(
            f"{url}/api/2.0/mlflow/runs/create", json=run, headers=headers, timeout=30
        ).raise_for_status()
        path = created.json()["run"]["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
        artifact = f"{url}/api/2.0/mlflow-artifacts/artifacts/{path}/name.txt"
        httpx.put(artifact, content=name.encode(), headers=headers, timeout=30).raise_for_status()
        self.logged.add(name)

    def check(self, mlflow: tuple[str, str]) -> None:
        url, headers = mlflow[0], {"Authorization": f"Bearer {mlflow[1]}"}
        query = {"experiment_ids": ["0"]}
        found = httpx.post(f"{url}/api/2.0/mlflow/runs/search", json=query, headers=headers, timeout=30)
        runs = {
            run["info"]["run_name"]: run["info"] for run in found.raise_for_status().json().get("runs", [])
        }
        assert set(runs) == self.logged
        for name, run in runs.items():
            path = run["artifact_uri"].removeprefix("mlflow-artifacts:/")
            artifact = httpx.get(
                f"{url}/api/2.0/mlflow-artifacts/artifacts/{path}/name.txt", headers=headers, timeout=30
            )
            assert artifact.text == name


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """One folder for all kills, so that each start is a restart; too long a path for sockets."""
    return tmp_path_factory.mktemp("data") / ("deep-" * 20) / ("deeper-" * 10)


@pytest.fixture(scope="module")
def runs():
    return MlflowRuns()


def test_two_stacks_run_on_one_machine(data_dir, runs, tmp_path):
    """The first ends by a kill of its command, the second by Ctrl-C twice."""
    second_dir = tmp_path / "second"
    data_dir.mkdir(parents=True, exist_ok=True)
    data_dir.chmod(0o755)  # as set by hand, or by an earlier version
    with syncbn_up(data_dir) as first, syncbn_up(second_dir) as second:
        one, two = wait_until_ready(first, data_dir), wait_until_ready(second, second_dir)
        for connection, directory in ((one, data_dir), (two, second_dir)):
            for folder in (directory, short_folder(directory)):  # the second stack has Ray's logs and sockets
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE((directory / "connection.json").stat().st_mode) == 0o600
            assert httpx.get(f"{connection.url}/readyz", timeout=30).is_success
            assert httpx.get(f"{connection.ray_address}/api/jobs/", timeout=30).status_code == 401
            start_stubborn_job(connection, directory)
        assert one.token != two.token
        with pytest.raises(StackError, match="another stack runs on"):
            LocalStack(data_dir).start()

        of_first, of_second = (
            everything_below(psutil.Process(first.pid)),
            everything_below(psutil.Process(second.pid)),
        )
        assert listening_addresses(of_first + of_second) == {"127.0.0.1", "::ffff:127.0.0.1"}

        runs.log(mlflow_below(first, data_dir), "first")
        first.kill()
        assert_ended(of_first, data_dir)
        assert second.poll() is None
        assert httpx.get(f"{two.url}/readyz", timeout=30).is_success

        os.killpg(second.pid, signal.SIGINT)  # Ctrl-C twice
        os.killpg(second.pid, signal.SIGINT)
        assert_ended(of_second, second_dir)
        assert second.wait() == 0


@pytest.mark.parametrize("victim", ["api", pytest.param("up", marks=pytest.mark.slow)])
def test_no_process_outlives_the_api_or_a_terminated_command(data_dir, runs, victim):
    with syncbn_up(data_dir) as process:
        connection = wait_until_ready(process, data_dir)
        runs.check((connection.mlflow_url, connection.token))
        runs.log(mlflow_below(process, data_dir), victim)
        start_stubborn_job(connection, data_dir)
        everything = everything_below(psutil.Process(process.pid))
        if victim == "up":
            process.terminate()
        else:
            (api,) = [below for below in everything if "serve" in below.cmdline()]
            api.kill()
        assert_ended(everything, data_dir)
        output = process.communicate()[0]
        assert process.returncode == (0 if victim == "up" else 1)
        assert ("api was killed by signal 9" in output) == (victim == "api")


@pytest.mark.parametrize(
    "victim",
    [
        "raylet",
        # The same rules of the supervisor: a process itself, as the API above, a required child, and the exit
        # of a child counted as that of its process.
        pytest.param("mlflow", marks=pytest.mark.slow),
        pytest.param("ray", marks=pytest.mark.slow),
        pytest.param("gcs_server", marks=pytest.mark.slow),
        pytest.param("uvicorn", marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_a_server_of_the_stack(data_dir, runs, victim):
    part = {"raylet": "ray", "gcs_server": "ray", "uvicorn": "mlflow"}.get(victim, victim)
    with LocalStack(data_dir, api=False) as stack:
        runs.check(stack.mlflow)
        runs.log(stack.mlflow, victim)
        everything = everything_below(psutil.Process(stack.process_ids["ray"]).parent().parent())
        doomed = psutil.Process(stack.process_ids[part])
        if victim in ("raylet", "gcs_server"):
            (doomed,) = [child for child in doomed.children() if child.name() == victim]
        elif victim == "uvicorn":
            (doomed,) = doomed.children()
        begin = time.monotonic()
        doomed.kill()
        reason = stack.wait(STOP_LIMIT_SECONDS)
        assert reason is not None
        ends = {
            "raylet": "ray lost its raylet",
            "gcs_server": "ray lost its gcs_server",
            "uvicorn": "mlflow ended with status",
        }
        assert reason.startswith(ends.get(victim, f"{part} was killed by signal 9"))
        assert still_alive(everything, STOP_LIMIT_SECONDS - (time.monotonic() - begin)) == []
        assert working_in(data_dir) == []
