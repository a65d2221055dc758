"""The same tests on a real MLflow and on its stand-in; then what only the real one can show."""

import time
from dataclasses import replace

import pytest

from service.adapters.mlflow import MlflowRunsOverHttp, flatten, git_commit
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState, new_id
from tests.fakes import FakeMlflow
from tests.service.examples import make_comparison, make_job


@pytest.fixture
def real(stack):
    return MlflowRunsOverHttp(stack.mlflow[0], 20, stack.mlflow[1])


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.ray)])
def runs(request):
    return FakeMlflow() if request.param == "fake" else request.getfixturevalue("real")


async def test_starting_again_finds_the_same_run(runs, capfd):
    comparison = make_comparison(name=new_id("comparison"))
    job = make_job(comparison_id=comparison.id)
    parent = await runs.start_comparison(comparison)
    first = await runs.start_job(job, replace(comparison, mlflow_run_id=parent.run_id))
    assert await runs.start_comparison(comparison) == parent
    assert await runs.start_job(replace(job, attempt=2), replace(comparison, mlflow_run_id=parent.run_id)) == first
    assert first.run_id != parent.run_id
    await runs.finish(first.run_id, JobState.SUCCEEDED)
    await runs.finish(first.run_id, JobState.SUCCEEDED)
    assert await runs.curve(first.run_id, "accuracy") == await runs.curve("0" * 32, "accuracy") == []
    await runs.finish("0" * 32, JobState.FAILED)
    await runs.check()
    assert capfd.readouterr().out == ""  # MLflow's client would print addresses into the service's log


@pytest.mark.ray
async def test_what_a_run_says_about_its_job(stack, real):
    comparison = make_comparison(name=new_id("comparison"))
    parent = await real.start_comparison(comparison)
    comparison = replace(comparison, mlflow_run_id=parent.run_id)
    job = make_job(name="norm=sync seed=1", comparison_id=comparison.id, variant={"norm": "sync", "seed": 1}, attempt=2)
    address = await real.start_job(job, comparison)
    client = real._client
    run = client.get_run(address.run_id)
    assert client.get_experiment(run.info.experiment_id).name == comparison.name
    assert address.experiment_id == run.info.experiment_id
    assert run.info.run_name == "norm=sync seed=1"
    assert run.data.params.items() >= {"norm": "sync", "optimizer.lr": "0.1", "model.hidden": "[100, 100, 100]"}.items()
    expected = {"norm": "sync", "seed": "0", "attempt": "2", "world_size": "1", "git_commit": git_commit()}
    assert run.data.tags.items() >= (expected | {"mlflow.parentRunId": parent.run_id, "syncbn.job_id": job.id}).items()
    await real.finish(address.run_id, JobState.CANCELLED)
    assert client.get_run(address.run_id).info.status == "KILLED"
    client.log_metric(address.run_id, "accuracy", 0.5, step=10)
    client.log_metric(address.run_id, "accuracy", 0.25, step=5)
    assert await real.curve(address.run_id, "accuracy") == [(5, 0.25), (10, 0.5)]


@pytest.mark.ray
async def test_a_deleted_experiment_comes_back(real):
    job = make_job(comparison_id="x")
    comparison = make_comparison(name=new_id("comparison"))
    first = await real.start_job(job, comparison)
    experiment_id = real._client.get_run(first.run_id).info.experiment_id
    real._client.delete_experiment(experiment_id)
    again = await real.start_job(make_job(), comparison)
    assert real._client.get_run(again.run_id).info.experiment_id == experiment_id


@pytest.mark.ray
async def test_a_deleted_run_is_left_alone(real):
    run = await real.start_job(make_job(), None)
    real._client.delete_run(run.run_id)
    await real.finish(run.run_id, JobState.SUCCEEDED)
    assert await real.curve(run.run_id, "accuracy") == []
    assert real._client.get_run(run.run_id).info.status == "RUNNING"


async def test_a_dead_server_is_unavailable_in_time():
    runs = MlflowRunsOverHttp("http://127.0.0.1:1", 5)
    began = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="MLflow at"):
        await runs.check()
    assert time.monotonic() - began < 8


def test_params_are_named_by_path():
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}
