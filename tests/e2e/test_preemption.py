"""Preemption, pause and resumption of running jobs on a real Ray, without a changed bit."""

import re
import time

import pytest
import torch

from service.domain.submission import SubmitOptions
from tests.dist import run_on_ranks
from tests.trainer.factories import train_here
from trainer.jobspec import JobSpec

pytestmark = pytest.mark.e2e

# Without the request to stop there would be no checkpoint before a minute has passed.
SPEC = {
    "model": {"name": "mlp", "hidden": [24, 16], "dropout": 0.1},
    "data": {"name": "digits"},
    "num_workers": 2,
    "global_batch_size": 50,
    "steps": 2_000,
    "eval_every": 1_000,
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "log_model": False,
}
LONG = SPEC | {"steps": 6_000}
URGENT = SPEC | {"num_workers": 3}
"""Spec of a job that does not fit next to one with two workers."""


def wait_for(client, job_id, is_reached, seconds=180):
    deadline = time.monotonic() + seconds
    while not is_reached(job := client.job(job_id)):
        if job.state.is_terminal or time.monotonic() > deadline:
            pytest.fail(f"{job}\n{client.logs(job_id)}")
        time.sleep(0.1)
    return job


def is_in_attempt(number, step):
    return lambda job: job.attempt == number and job.progress and job.progress.step >= step


def wait_until_queued(client, job_id):
    began = time.monotonic()
    job = wait_for(client, job_id, lambda job: job.state == "queued")
    print(f"{job.reason} after {time.monotonic() - began:.1f} s")
    return job


def submit_and_preempt(client, spec, urgent_spec):
    """Submit a job, and one with a higher priority once it runs; return both after the preemption."""
    low = client.submit_job("low", spec, SubmitOptions(priority=-1, preemptible=True))
    wait_for(client, low.id, is_in_attempt(1, 100))
    urgent = client.submit_job("urgent", urgent_spec)
    preempted = wait_until_queued(client, low.id)
    assert (preempted.attempt, preempted.failures, preempted.failure_kind) == (2, {}, "preempted")
    assert preempted.preempted_by == urgent.id
    assert preempted.cpu_hours > 0
    return preempted, urgent


def wait_for_the_same_bits(client, stack, job_id, spec, attempts):
    """Wait for the end of a job of several attempts, and compare its model with an undisturbed one."""
    ended = wait_for(client, job_id, lambda job: job.state == "succeeded")
    assert (ended.attempt, ended.failures, ended.reason) == (attempts, {}, f"finished {spec['steps']} steps")
    for attempt in range(1, attempts):
        before, after = client.logs(job_id, attempt=attempt), client.logs(job_id, attempt=attempt + 1)
        saved = re.search(r"stopped on request of the service; saved after (\d+) steps", before)
        assert f"resuming from step-{int(saved[1]):012d}-" in after
    state, _, _ = run_on_ranks(train_here, 2, JobSpec.model_validate(spec), timeout_seconds=200)[0]
    path = stack.data_dir / "storage" / job_id / f"attempt-{attempts}" / "model.pt"
    model = torch.load(path, weights_only=True)
    assert model.keys() == state.keys()
    assert [name for name in state if model[name].numpy().tobytes() != state[name].numpy().tobytes()] == []


def test_a_preempted_job_continues_with_the_same_bits_and_a_running_one_is_paused(stack, service):
    with service.client() as client:
        low, urgent = submit_and_preempt(client, SPEC, URGENT | {"steps": 10_000_000})
        client.pause(low.id)
        wait_for(client, urgent.id, is_in_attempt(1, 1))
        client.pause(urgent.id)
        paused = wait_until_queued(client, urgent.id)
        assert (paused.attempt, paused.reason) == (2, "paused: attempt 1 saved its state")
        assert client.job(low.id).state == "queued"
        client.cancel(urgent.id)
        assert client.resume(low.id).id == low.id
        wait_for_the_same_bits(client, stack, low.id, SPEC, attempts=2)
        assert client.job(urgent.id).state == "cancelled"


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_preempted_and_paused_job_continues_with_the_same_bits(stack, service):
    with service.client() as client:
        preempted, urgent = submit_and_preempt(client, LONG, URGENT | {"steps": 5})
        wait_for(client, preempted.id, is_in_attempt(2, 200))
        assert client.job(urgent.id).state == "succeeded"
        client.pause(preempted.id)
        paused = wait_until_queued(client, preempted.id)
        assert (paused.attempt, paused.reason) == (3, "paused: attempt 2 saved its state")
        assert paused.cpu_hours > preempted.cpu_hours
        assert client.resume(preempted.id).id == preempted.id
        wait_for_the_same_bits(client, stack, preempted.id, LONG, attempts=3)
