"""Fixtures that several packages' tests share."""

import os

# The tests' processes share few cores: one thread each, set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from service.local.stack import LocalStack


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """A real Ray and a real MLflow for the whole session, without the API."""
    with (
        LocalStack(tmp_path_factory.mktemp("stack"), api=False, cpus=4) as stack,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_TOKEN", stack.mlflow[1])  # of MLflow's clients in the tests themselves
        yield stack
