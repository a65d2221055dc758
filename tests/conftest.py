"""Fixtures shared by the tests of several packages."""

import os
from functools import cache
from pathlib import Path

# The test processes share few cores: one thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from service.local.stack import LocalStack
from tests.mlflow_server import serving_mlflow

# Time limits are those of pytest: on a busy machine an example takes any number of milliseconds.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

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
def mlflow_server(tmp_path_factory):
    """Address and secret of a real MLflow for the whole session, without Ray."""
    with serving_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
