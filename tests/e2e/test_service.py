"""Jobs and comparisons through HTTP, on a real Ray and MLflow."""

import time
from pathlib import Path

import pytest
import yaml

from service.client import ApiError
from tests.e2e.service import SPEC
from tests.service.store.earlier import copy_to_revision

pytestmark = pytest.mark.e2e

ENDLESS = SPEC | {"steps": 10_000_000, "eval_every": 1000}


def test_a_comparison_runs_and_is_reported(service, compared):
    """Two jobs run on two workers each; MLflow has their curves, and the report compares them."""
    from mlflow import MlflowClient

    with service.client() as client:
        comparison = client.comparison(compared.split(":")[0])
        assert [job.state for job in comparison.jobs] == ["succeeded", "succeeded"], client.logs(
            comparison.jobs[0].id
        )
        assert comparison.jobs[1].progress.step == comparison.jobs[1].progress.total_steps == 100
        report = client.report(comparison.id, curves=True)
        assert report.finished
        assert [variant.n for variant in report.variants] == [1, 1]
        assert [len(variant.curves[0].points) for variant in report.variants] == [11, 11]
        assert report.variants[1].best.median > 0.8
        assert report.variants[1].verdict == "cannot tell"  # of one seed
        assert "step 100/100" in client.logs(comparison.jobs[0].id)
    mlflow = MlflowClient(service.environment["SYNCBN_MLFLOW_URL"])
    children = [mlflow.get_run(job.mlflow_run_id) for job in comparison.jobs]
    deadline = time.monotonic() + 20
    while (parent := mlflow.get_run(children[0].data.tags["mlflow.parentRunId"])).info.status != "FINISHED":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert report.conclusion.sentence[:20] in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["norm_sync/final"] == report.variants[1].final.median
    paths = {artifact.path for artifact in mlflow.list_artifacts(parent.info.run_id)}
    assert paths >= {"report.html", "report.json", "report.md", "figures"}
    children = [mlflow.get_run(run.info.run_id) for run in children]
    assert [run.info.status for run in children] == ["FINISHED", "FINISHED"]
    assert mlflow.get_experiment(children[0].info.experiment_id).name == "end to end"
    assert len(mlflow.get_metric_history(children[1].info.run_id, "train_loss")) == 10


def test_an_invalid_spec_is_rejected_and_nothing_is_stored(service):
    with service.client() as client:
        before = [job.id for job in client.jobs()]
        with pytest.raises(ApiError, match=r"spec.optimizer.lr: Input should be greater than 0"):
            client.submit_job("bad", SPEC | {"steps": 1, "optimizer": {"lr": -1}})
        assert [job.id for job in client.jobs()] == before


@pytest.fixture(scope="module")
def jobs(service):
    """An endless and a short job that fill the cluster together, and one that waits for both."""
    with service.client() as client:
        endless = client.submit_job("to be cancelled", ENDLESS)
        ending = client.submit_job("through a crash", SPEC | {"steps": 1500, "eval_every": 500})
        waiting = client.submit_job("queued behind them", SPEC | {"steps": 5, "num_workers": 4})
    return endless, ending, waiting


def test_a_job_that_ends_while_the_api_is_dead_is_reported_after_an_upgrade(service, jobs):
    """The database that the next process finds is of an earlier version."""
    _, job, waiting = jobs
    service.until(job.id, "running", progress=1)
    service.kill()
    address = service.environment["SYNCBN_DATABASE_URL"]
    copy_to_revision(Path(address.removeprefix("sqlite+aiosqlite:///")), "0013")
    service.start()
    ended = service.until(job.id, "succeeded")
    assert (ended.attempt, ended.reason, ended.progress.step) == (1, "finished 1500 steps", 1500)
    with service.client() as client:
        assert client.job(waiting.id).state == "queued"
        assert client.logs(job.id).count("step 1500/1500") == 1


def test_a_running_job_is_cancelled_within_15_seconds_and_leaves_nothing(service, jobs):
    job, _, waiting = jobs
    service.until(job.id, "running", progress=1)
    with service.client() as client:
        began = time.monotonic()
        client.cancel(job.id)
        ended = service.until(job.id, "cancelled", seconds=15)
        assert time.monotonic() - began < 15
        assert (ended.attempt, ended.reason) == (1, "cancelled on request")
        assert [(event.state, event.reason) for event in client.events(job.id).events][2:] == [
            ("running", "attempt 1 is running"),
            ("running", "cancellation requested"),
            ("cancelled", "cancelled on request"),
        ]
    # The workers have ended too: a job that needs the whole cluster can run.
    assert service.until(waiting.id, "succeeded").attempt == 1


def test_the_command_line_for_jobs(syncbn):
    """Submit, list, show, log and clone as in the README; errors print no traceback."""
    (syncbn.folder / "job.yaml").write_text(yaml.safe_dump(SPEC | {"steps": 5, "num_workers": 1}))
    submitted = syncbn("submit", "job.yaml", "--name", "by hand", "--wait")
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.endswith(": succeeded, finished 5 steps\n")
    assert "5/5 steps" in submitted.stderr
    job_id = submitted.stdout.split(":")[0]
    assert job_id in syncbn("jobs").stdout
    assert '"state": "succeeded"' in syncbn("show", job_id, "--json").stdout
    assert "finished 5 steps" in syncbn("show", job_id).stdout
    assert "step 5/5" in syncbn("logs", job_id).stdout
    followed = syncbn("logs", "-f", job_id, "--rank", "0")
    assert "worker 0 of 1" in followed.stdout
    assert followed.stderr == f"{job_id}: succeeded\n"
    assert "4 CPUs" in syncbn("cluster").stdout
    for arguments, message in [
        (("show", "job-0"), "there is no job 'job-0'"),
        (("cancel", job_id), "already succeeded"),
        (("--help",), ""),
        (("submit", "nothing.yaml"), "does not exist"),
    ]:
        answer = syncbn(*arguments)
        assert message in answer.stderr
        assert "Traceback" not in answer.stderr
        assert (answer.returncode == 0) == (message == "")


def test_the_command_line_for_comparisons(syncbn, compared):
    assert "norm=sync" in compared
    reported = syncbn("report", compared.split(":")[0], "--plot", "curves.png")
    assert "steps to accuracy ≥ 0.5" in reported.stdout
    assert (syncbn.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
