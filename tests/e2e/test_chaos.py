"""Repeated kills of the service and Ray's head: short form of the benchmark."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.timeout(600)
def test_each_key_is_one_job_and_no_attempt_runs_twice():
    options = ["--clients=16", "--keys=2", "--service-kills=2", "--head-kills=1", "--succeeded=2"]
    ended = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=560, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "32 keys in" in ended.stdout
    assert "2 times" in ended.stdout
