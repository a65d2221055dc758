"""Fixtures shared by the tests of several packages."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

# The test processes share few cores: one thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from hypothesis import HealthCheck, settings

from service.local.stack import LocalStack
from tests.e2e.service import SPEC, Service
from tests.mlflow_server import serving_mlflow

# Time limits are those of pytest: on a busy machine an example takes any number of milliseconds.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")

SHARED = ("e2e", "ray")
"""Markers of tests that run in one process: they share a stack, or start one."""


def pytest_collection_modifyitems(items):
    """Run the scopes that take longest first, and tests that measure time when little else runs."""
    items.sort(key=lambda item: ORDER.get(scope_of(item.nodeid), 1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        """Distributes files over processes, but for those that share one."""

        def _split_scope(self, nodeid):
            return scope_of(nodeid)

    return Scheduling(config, log)


def scope_of(nodeid):
    """Return the scope of a test: its file, or the name of the process that its file shares."""
    return scope_of_file(nodeid.split("::")[0])


@cache
def scope_of_file(file):
    text = (Path(__file__).parents[1] / file).read_text()
    if any(f"mark.{marker}" in text for marker in SHARED):
        return "stacks"
    return "timed" if "mark.timed" in text else file


ORDER = {"stacks": 0, "timed": 2}


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def sqlite_without_fsync():
    """Commits of SQLite without fsync."""
    from sqlalchemy import event
    from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection
    from sqlalchemy.engine import Engine

    def skip_fsync(connection, _):
        if isinstance(connection, AsyncAdapt_aiosqlite_connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", skip_fsync)


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """A real Ray and MLflow for the whole session, without the API."""
    with (
        LocalStack(tmp_path_factory.mktemp("stack"), api=False, cpus=4) as stack,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_TOKEN", stack.mlflow[1])  # MLflow clients in the tests
        yield stack


@pytest.fixture(scope="session")
def service(stack, tmp_path_factory):
    """The API in its own process, on the stack of the session."""
    service = Service(stack.api_environment, tmp_path_factory.mktemp("service") / "serve.log")
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="session")
def syncbn(service, tmp_path_factory):
    """Run the command in its own process, in a folder that all calls share."""
    environment = service.environment | {"SYNCBN_URL": service.url, "COLUMNS": "200"}
    folder = tmp_path_factory.mktemp("syncbn")

    def run(*arguments):
        command = [sys.executable, "-m", "service.cli.app", *arguments]
        return subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200, check=False
        )

    run.folder = folder
    return run


@pytest.fixture(scope="session")
def compared(syncbn):
    """Output of `syncbn compare` for two jobs, one per norm, after their end."""
    content = {
        "name": "end to end",
        "spec": SPEC | {"steps": 100, "eval_every": 10, "log_model": True},
        "matrix": {"norm": ["none", "sync"]},
        "target": 0.5,
    }
    (syncbn.folder / "comparison.yaml").write_text(yaml.safe_dump(content))
    compared = syncbn("compare", "comparison.yaml")
    assert compared.returncode == 0, compared.stderr
    return compared.stdout


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """Address and secret of a real MLflow for the whole session, without Ray."""
    with serving_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
