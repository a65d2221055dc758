"""Preemption, pause and resumption of a running job on a real Ray, without a changed bit."""

import re
import time

import pytest
import torch

from service.domain.submission import SubmitOptions
from tests.dist import run_on_ranks
from tests.e2e.service import Service
from tests.trainer.factories import train_here
from trainer.jobspec import JobSpec

pytestmark = pytest.mark.e2e

STEPS = 6_000
# Without the request to stop there would be no checkpoint before a minute has passed.
SPEC = {
    "model": {"name": "mlp", "hidden": [24, 16], "dropout": 0.1},
    "data": {"name": "digits"},
    "num_workers": 2,
    "global_batch_size": 50,
    "steps": STEPS,
    "eval_every": 1_000,
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "log_model": False,
}


@pytest.fixture
def service(stack, tmp_path):
    service = Service(stack.api_environment, tmp_path / "serve.log")
    service.start()
    yield service
    service.stop()


def wait_for(client, job_id, is_reached, seconds=180):
    deadline = time.monotonic() + seconds
    while not is_reached(job := client.job(job_id)):
        details = f"{job}\n{client.logs(job_id)}"
        assert not job.state.is_terminal, details
        assert time.monotonic() < deadline, details
        time.sleep(0.1)
    return job


def is_in_attempt(number, step):
    return lambda job: job.attempt == number and job.progress and job.progress.step >= step


@pytest.mark.timeout(600)
def test_a_preempted_and_paused_job_continues_with_the_same_bits(stack, service):
    with service.client() as client:
        low = client.submit_job("low", SPEC, SubmitOptions(priority=-1, preemptible=True))
        wait_for(client, low.id, is_in_attempt(1, 100))
        urgent = client.submit_job("urgent", SPEC | {"num_workers": 3, "steps": 5})
        began = time.monotonic()
        preempted = wait_for(client, low.id, lambda job: job.state == "queued")
        print(f"preempted after {time.monotonic() - began:.1f} s")
        assert (preempted.attempt, preempted.failures, preempted.failure_kind) == (2, {}, "preempted")
        assert preempted.preempted_by == urgent.id
        wait_for(client, low.id, is_in_attempt(2, 200))
        assert client.job(urgent.id).state == "succeeded"
        began = time.monotonic()
        client.pause(low.id)
        paused = wait_for(client, low.id, lambda job: job.state == "queued")
        print(f"paused after {time.monotonic() - began:.1f} s")
        assert (paused.attempt, paused.reason) == (3, "paused: attempt 2 saved its state")
        assert paused.cpu_hours > preempted.cpu_hours > 0
        assert client.resume(low.id).id == low.id
        ended = wait_for(client, low.id, lambda job: job.state == "succeeded")
        assert (ended.attempt, ended.failures, ended.reason) == (3, {}, f"finished {STEPS} steps")
        for attempt in (1, 2):
            before, after = client.logs(low.id, attempt=attempt), client.logs(low.id, attempt=attempt + 1)
            saved = re.search(r"stopped on request of the service; saved after (\d+) steps", before)
            assert f"resuming from step-{int(saved[1]):012d}-" in after
    state, _, _ = run_on_ranks(train_here, 2, JobSpec.model_validate(SPEC), timeout_seconds=200)[0]
    folder = stack.data_dir / "storage" / low.id / "attempt-3"
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model.keys() == state.keys()
    assert [name for name in state if model[name].numpy().tobytes() != state[name].numpy().tobytes()] == []
