"""Conformance of the API to its document, by generated requests.

schemathesis calls every operation alone, and sequences of operations along links. `schemathesis.toml` holds
its settings and the reasons for narrowed checks. `make test-contract` generates more requests.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.service import running_service

SETTINGS = Path(__file__).parent / "schemathesis.toml"
LONG = os.environ.get("CONTRACT") == "long"


def call_api(url, *options):
    """Run schemathesis with a fixed seed and return its output; no check may fail."""
    program = Path(sys.executable).with_name("schemathesis")
    command = [
        program,
        "--config-file",
        SETTINGS,
        "run",
        f"{url}/openapi.json",
        "--seed",
        "1",
        "--no-color",
        *options,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    assert run.returncode == 0
    return run.stdout


@pytest.mark.timeout(3_600 if LONG else 300)
def test_no_request_breaks_the_contract(tmp_path):
    phases = "examples,coverage,fuzzing" if LONG else "examples,fuzzing"
    with running_service(tmp_path) as url:
        output = call_api(url, "--phases", phases, "--max-examples", "50" if LONG else "10")
    selected, tested = re.search(r"Selected: (\d+)/\d+\s+Tested: (\d+)", output).groups()
    assert int(selected) == int(tested) > 20


@pytest.mark.timeout(3_600 if LONG else 300)
def test_no_sequence_of_linked_requests_breaks_the_contract(tmp_path):
    with running_service(tmp_path) as url:
        output = call_api(url, "--phases", "examples,stateful", "--max-time", "300" if LONG else "18")
    assert int(re.search(r"API Links: +(\d+) covered", output)[1]) > 20
