"""Elastic job on a Ray cluster of several nodes: one node is drained, another one joins."""

import os
import re
import secrets
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from service.adapters.job_log import AttemptLog, LogOffset
from service.adapters.run_storage import RunFiles
from tests.trainer.factories import train_here
from trainer.jobspec import (
    JOB_VARIABLE,
    OUTCOME_FILE,
    Allowlist,
    AttemptContext,
    AttemptTask,
    JobSpec,
    Outcome,
)

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
STEPS = 200
SPEC = {
    "model": {"name": "import:tests.trainer.networks:slow", "arguments": {"seconds": 0.8}},
    "data": {"name": "digits"},
    "num_workers": [2, 4],
    "global_batch_size": 50,
    "steps": STEPS,
    "eval_every": STEPS,
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "precision": "fp64",
    "checkpoint": {"every": 100_000},
    "collective_timeout_seconds": 60,
}


@contextmanager
def cluster_of(monkeypatch):
    """Start Ray's head, without CPUs to train on."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def read_log(folder):
    return "\n".join(line.text for line in AttemptLog(folder / "attempt-1", LogOffset()).read(is_over=True))


def wait_for(folder, pattern, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := re.findall(pattern, read_log(folder))):
        assert time.monotonic() < deadline, read_log(folder)
        time.sleep(0.2)
    return found


def count_steps(folder):
    """Return the steps that the run has completed."""
    progress = folder / "attempt-1" / "progress.json"
    return int(re.findall(r'"step":(\d+)', progress.read_text())[0]) if progress.exists() else 0


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of Ray, which leaves sockets open
def test_draining_a_node_loses_no_step_and_a_new_node_is_used(tmp_path, monkeypatch):
    with cluster_of(monkeypatch) as cluster:
        cluster.add_node(num_cpus=2)
        leaving = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        permissions = Allowlist(imports=("tests.trainer.networks:*",))
        context = AttemptContext(
            job_id=tmp_path.name, attempt=1, name="elastic", folder=str(tmp_path), permissions=permissions
        )
        task = AttemptTask(spec=JobSpec.model_validate(SPEC), context=context)
        environment = os.environ | {
            JOB_VARIABLE: str(RunFiles(tmp_path.parent).write_task(task)),
            "RAY_ADDRESS": cluster.address,
        }
        driver = subprocess.Popen([sys.executable, "-m", "trainer"], env=environment, cwd=tmp_path)
        try:
            wait_for(tmp_path, r"worker 3 of 4 on")
            while count_steps(tmp_path) < 5:
                time.sleep(0.1)
            drain = [
                "--node-id",
                leaving.node_id,
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message",
                "test",
            ]
            ray = Path(sys.executable).with_name("ray")
            command = [
                ray,
                "drain-node",
                "--address",
                cluster.address,
                *drain,
                "--deadline-remaining-seconds",
                "60",
            ]
            subprocess.run(command, check=True, timeout=60)
            [saved] = wait_for(
                tmp_path, r"preempted: a node is about to be preempted; saved after (\d+) steps"
            )
            [(resumed, workers)] = wait_for(
                tmp_path, r"resuming from step-0*(\d+)-\S+, saved by (\d) workers"
            )
            assert (resumed, workers) == (saved, "4")
            wait_for(tmp_path, r"worker 1 of 2 on")
            cluster.remove_node(leaving)
            cluster.add_node(num_cpus=2)
            assert len(wait_for(tmp_path, r"(?s)worker 1 of 2 on.*worker 3 of 4 on", 180)) == 1
            assert driver.wait(300) == 0, read_log(tmp_path)
        finally:
            driver.kill()
            driver.wait(10)
    outcome = Outcome.model_validate_json((tmp_path / "attempt-1" / OUTCOME_FILE).read_text())
    assert (outcome.state, outcome.step) == ("succeeded", STEPS)
    quick = SPEC | {"model": {"name": SPEC["model"]["name"], "arguments": {"seconds": 0.0}}, "num_workers": 1}
    state, _, _ = train_here(JobSpec.model_validate(quick))
    model = torch.load(tmp_path / "attempt-1" / "model.pt", weights_only=True)
    for name, value in state.items():
        assert (model[name].double() - value.double()).abs().max() <= 1e-9, name
