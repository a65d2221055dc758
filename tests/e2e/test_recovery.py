"""Recovery of a job from the loss of a worker, its driver and Ray's head at random steps.

The result has the same bits as that of an undisturbed job.
"""

import os
import random
import re
import signal
import time

import psutil
import pytest
import torch
from mlflow import MlflowClient

from service.client import Client
from service.local.stack import LocalStack
from tests.dist import run_on_ranks
from tests.processes import still_alive, working_in
from tests.trainer.factories import train_here
from trainer.jobspec import JobSpec

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

STEPS = 3_000
SPEC = {
    "model": {"name": "mlp", "hidden": [24, 16], "dropout": 0.1},
    "data": {"name": "digits"},
    "num_workers": 2,
    "global_batch_size": 50,
    "steps": STEPS,
    "eval_every": 500,
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "checkpoint": {"every": 100},
    "log_model": False,
}


def wait_for_step(client, job_id, attempt, least, seconds=120):
    """Wait until an attempt is beyond step `least`; return the job."""
    deadline = time.monotonic() + seconds
    while True:
        job = client.job(job_id)
        if job.attempt == attempt and job.progress and job.progress.step > least:
            return job
        assert not job.state.is_terminal, f"{job}\n{client.logs(job_id)}"
        assert time.monotonic() < deadline, f"{job}\n{client.logs(job_id)}"
        time.sleep(0.05)


def worker_processes(client, job_id):
    return [int(number) for number in re.findall(r"worker \d of 2 on \S+ process (\d+)", client.logs(job_id))]


def driver_process(job_id):
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:3] == ["-m", "trainer"] and job_id in process.environ().get(
                "SYNCBN_JOB", ""
            ):
                return process.pid
        except (psutil.Error, IndexError):
            continue
    raise AssertionError(f"{job_id} has no driver")


def head_process(stack):
    return next(process.pid for process in working_in(stack.data_dir) if process.name() == "gcs_server")


@pytest.mark.timeout(600)
def test_killing_workers_driver_and_head_changes_no_bit_of_the_result(tmp_path, monkeypatch):
    data_dir, chance = tmp_path / "data", random.Random()
    with (
        LocalStack(data_dir, cpus=2) as stack,
        Client(stack.connection.url, stack.connection.token) as client,
    ):
        job_id = client.submit_job("often killed", SPEC).id
        job = wait_for_step(client, job_id, 1, chance.randint(150, 500))
        os.kill(chance.choice(worker_processes(client, job_id)), signal.SIGKILL)
        stopped_at = job.progress.step
        job = wait_for_step(client, job_id, 1, stopped_at + chance.randint(200, 500))
        assert len(worker_processes(client, job_id)) == 4
        assert "worker_lost: worker" in client.logs(job_id)
        stopped_at = job.progress.step
        os.kill(driver_process(job_id), signal.SIGKILL)
        job = wait_for_step(client, job_id, 2, stopped_at + chance.randint(200, 500))
        assert "resuming from step-" in client.logs(job_id)
        stopped_at = job.progress.step
        os.kill(head_process(stack), signal.SIGKILL)
        assert stack.wait(60)
    assert still_alive(working_in(data_dir), 15) == []
    with (
        LocalStack(data_dir, cpus=2) as stack,
        Client(stack.connection.url, stack.connection.token) as client,
    ):
        deadline = time.monotonic() + 180
        while not (job := client.job(job_id)).state.is_terminal:
            assert time.monotonic() < deadline, f"{job}\n{client.logs(job_id)}"
            time.sleep(0.5)
        assert (job.state, job.attempt, job.reason) == ("succeeded", 3, f"finished {STEPS} steps")
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", stack.connection.token)
        mlflow = MlflowClient(stack.connection.mlflow_url)
        for metric in ("accuracy", "test_loss"):
            steps = [point.step for point in mlflow.get_metric_history(job.mlflow_run_id, metric)]
            assert sorted(steps) == list(range(0, STEPS + 1, 500))
    state, metrics, curve = run_on_ranks(train_here, 2, JobSpec.model_validate(SPEC), timeout_seconds=200)[0]
    model = torch.load(data_dir / "storage" / job_id / "attempt-3" / "model.pt", weights_only=True)
    assert model.keys() == state.keys()
    assert [name for name in state if model[name].numpy().tobytes() != state[name].numpy().tobytes()] == []
    assert curve[STEPS] == metrics
