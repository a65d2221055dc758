"""Fixtures of the tests of adapters."""

import pytest

from service.adapters.run_storage import RunFiles
from tests.service.examples import make_job


@pytest.fixture
def files(tmp_path):
    return RunFiles(tmp_path / "storage")


@pytest.fixture
def job():
    return make_job(attempt=1)


@pytest.fixture
def folder(files, job):
    files.close_attempts(job)
    return files.attempt_folder(job)
