"""Tests on a real MLflow and on its fake, and tests that only the real one can pass."""

import math
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import requests

from service.adapters.mlflow import MlflowRunsOverHttp
from service.adapters.mlflow_values import Publication, git_commit
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import JobState, new_id
from service.domain.mlflow_views import saved_view, view_tag
from tests.fakes import FakeMlflow
from tests.service.examples import make_comparison, make_job
from trainer.jobspec import JobSpec


@pytest.fixture
def real(mlflow_server):
    return MlflowRunsOverHttp(mlflow_server[0], 20, mlflow_server[1])


@pytest.fixture(params=["fake", "real"])
def runs(request):
    return FakeMlflow() if request.param == "fake" else request.getfixturevalue("real")


async def test_starting_again_finds_the_same_run(runs, capfd):
    comparison = make_comparison(name=new_id("comparison"))
    job = make_job(comparison_id=comparison.id)
    parent = await runs.start_comparison(comparison)
    first = await runs.start_job(job, replace(comparison, mlflow_run_id=parent.run_id))
    assert await runs.start_comparison(comparison) == parent
    assert (
        await runs.start_job(replace(job, attempt=2), replace(comparison, mlflow_run_id=parent.run_id))
        == first
    )
    assert first.run_id != parent.run_id
    await runs.finish(first.run_id, JobState.SUCCEEDED)
    await runs.finish(first.run_id, JobState.SUCCEEDED)
    assert await runs.curve(first.run_id, "accuracy") == await runs.curve("0" * 32, "accuracy") == []
    assert await runs.metric_names(first.run_id) == await runs.metric_names("0" * 32) == []
    await runs.finish("0" * 32, JobState.FAILED)
    await runs.check()
    assert capfd.readouterr().out == ""  # MLflow's client would print addresses into the service's log


async def test_a_run_records_its_job(real):
    comparison = make_comparison(name=new_id("comparison"))
    parent = await real.start_comparison(comparison)
    comparison = replace(comparison, mlflow_run_id=parent.run_id)
    job = make_job(
        name="norm=sync seed=1", comparison_id=comparison.id, variant={"norm": "sync", "seed": 1}, attempt=2
    )
    address = await real.start_job(job, comparison)
    client = real._client
    run = client.get_run(address.run_id)
    assert client.get_experiment(run.info.experiment_id).name == comparison.name
    assert address.experiment_id == run.info.experiment_id
    assert run.info.run_name == "norm=sync seed=1"
    assert (
        run.data.params.items()
        >= {"norm": "sync", "optimizer.lr": "0.1", "model.hidden": "[100, 100, 100]"}.items()
    )
    assert run.data.tags["variant"] == "norm=sync"
    expected = {"norm": "sync", "seed": "0", "attempt": "2", "world_size": "1", "git_commit": git_commit()}
    assert (
        run.data.tags.items()
        >= (expected | {"mlflow.parentRunId": parent.run_id, "syncbn.job_id": job.id}).items()
    )
    await real.finish(address.run_id, JobState.CANCELLED)
    assert client.get_run(address.run_id).info.status == "KILLED"
    client.log_metric(address.run_id, "accuracy", 0.5, step=10)
    client.log_metric(address.run_id, "accuracy", 0.25, step=5)
    assert await real.curve(address.run_id, "accuracy") == [(5, 0.25), (10, 0.5)]
    assert await real.metric_names(address.run_id) == ["accuracy"]


async def test_a_deleted_experiment_is_restored(real):
    job = make_job(comparison_id="x")
    comparison = make_comparison(name=new_id("comparison"))
    first = await real.start_job(job, comparison)
    experiment_id = real._client.get_run(first.run_id).info.experiment_id
    real._client.delete_experiment(experiment_id)
    again = await real.start_job(make_job(), comparison)
    assert real._client.get_run(again.run_id).info.experiment_id == experiment_id


async def test_a_deleted_run_is_not_changed(real):
    run = await real.start_job(make_job(), None)
    real._client.delete_run(run.run_id)
    await real.finish(run.run_id, JobState.SUCCEEDED)
    assert await real.curve(run.run_id, "accuracy") == []
    await real.publish(run.run_id, PUBLICATION)
    assert "mlflow.note.content" not in real._client.get_run(run.run_id).data.tags
    assert real._client.get_run(run.run_id).info.status == "RUNNING"


async def test_a_dead_server_is_unavailable_in_time():
    runs = MlflowRunsOverHttp("http://127.0.0.1:1", 5)
    began = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="MLflow at"):
        await runs.check()
    assert time.monotonic() - began < 8


PUBLICATION = Publication(
    description="**faster**: norm=sync",
    metrics={"norm_sync/best": 0.93, "norm_sync/steps to target": 100.0},
    files={"report.md": b"faster", "report.json": b"{}", "figures/curves.svg": b"<svg/>"},
    at=datetime(2026, 3, 2, tzinfo=UTC),
)


async def test_publishing_again_changes_nothing(runs):
    parent = await runs.start_comparison(make_comparison(name=new_id("comparison")))
    for _ in range(2):
        await runs.publish(parent.run_id, PUBLICATION)
    await runs.publish("0" * 32, PUBLICATION)


async def test_a_publication_is_the_description_metrics_and_artifacts_of_a_run(real):
    parent = await real.start_comparison(make_comparison(name=new_id("comparison")))
    long = replace(PUBLICATION, description="| a | b |\n" * 1_000)
    for publication in (long, PUBLICATION, PUBLICATION):
        await real.publish(parent.run_id, publication)
        note = real._client.get_run(parent.run_id).data.tags["mlflow.note.content"]
        if publication is long:
            assert 7_900 < len(note) <= 8_000
            assert note.endswith("| a | b |\n\nThe rest is in the artifact `report.md`.")
    run = real._client.get_run(parent.run_id)
    assert note == PUBLICATION.description
    assert run.data.metrics == PUBLICATION.metrics
    assert len(real._client.get_metric_history(parent.run_id, "norm_sync/best")) == 1
    paths = {artifact.path for artifact in real._client.list_artifacts(parent.run_id)}
    assert paths == {"report.md", "report.json", "figures"}


async def test_an_experiment_opens_on_runs_and_has_a_view_per_comparison(real):
    name = new_id("comparison")
    comparisons = [make_comparison(name=name), make_comparison(name=name)]
    parents = [await real.start_comparison(comparison) for comparison in comparisons]
    tags = real._client.get_experiment(parents[0].experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.note.content"].startswith("accuracy against the baseline norm=none.")
    for comparison, parent in zip(comparisons, parents, strict=True):
        assert tags[view_tag(comparison)] == saved_view(comparison, parent.run_id)
    single = await real.start_job(make_job(), None)
    kind = real._client.get_experiment(single.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"


async def test_values_that_mlflow_would_cut_are_artifacts(real, tmp_path):
    layers = [f"layer{number}" for number in range(900)]
    spec = {
        "model": {"name": "torchvision:resnet18"},
        "probes": {"measure": ["drift"], "layers": layers},
        "steps": 10,
    }
    job = make_job(spec=JobSpec.model_validate(spec))
    run = await real.start_job(job, None)
    assert await real.start_job(job, None) == run
    param = real._client.get_run(run.run_id).data.params["probes.layers"]
    assert len(str(layers)) > 8_000
    path = "long-values/probes.layers.txt"
    assert param == f"{len(str(layers)):,} characters, in the artifact {path}"
    file = real._client.download_artifacts(run.run_id, path, str(tmp_path))
    assert Path(file).read_text() == str(layers)  # noqa: ASYNC240 - small file


async def test_values_that_are_not_finite_survive_mlflow(real):
    run = await real.start_job(make_job(), None)
    logged = [0.5, math.inf, -math.inf, math.nan, sys.float_info.max / 2]
    for step, value in enumerate(logged):
        real._client.log_metric(run.run_id, "test_loss", value, step=step)
    curve = await real.curve(run.run_id, "test_loss")
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]
    assert repr([value for _, value in curve]) == repr(logged)


async def test_a_server_that_loses_uploads_is_unavailable(real, monkeypatch):
    parent = await real.start_comparison(make_comparison(name=new_id("comparison")))

    def fail(*_):
        raise requests.ConnectionError("lost")

    monkeypatch.setattr(real._client, "log_artifacts", fail)
    with pytest.raises(UpstreamUnavailable, match="lost"):
        await real.publish(parent.run_id, PUBLICATION)
