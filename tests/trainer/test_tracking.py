import json
import time

import pytest

from trainer.journal import open_journal
from trainer.spec import PROGRESS_FILE, JobSpec, Progress, RunContext, Task
from trainer.tracking import OUTBOX_FILE, Outbox, Silent


def read(folder):
    return [json.loads(line) for line in (folder / OUTBOX_FILE).read_text().splitlines()]


def test_without_a_run_the_metrics_stay_in_the_file(tmp_path):
    with Outbox(tmp_path) as outbox:
        outbox.log(0, {"accuracy": 0.1})
        outbox.log(10, {"accuracy": 0.5, "loss": 1.0})
    assert [(line["step"], line["metrics"]) for line in read(tmp_path)] == [
        (0, {"accuracy": 0.1}),
        (10, {"accuracy": 0.5, "loss": 1.0}),
    ]
    assert outbox.unsent == 0


def test_another_attempt_logs_no_step_again(tmp_path):
    with Outbox(tmp_path) as first:
        first.log(0, {"accuracy": 0.1})
        first.log(10, {"accuracy": 0.5})
    with (tmp_path / OUTBOX_FILE).open("a") as file:
        file.write('{"step": 20, "timest')  # killed while writing
    with Outbox(tmp_path) as second:
        for step in (0, 10, 20):
            second.log(step, {"accuracy": step / 100})
    assert [(line["step"], line["metrics"]["accuracy"]) for line in read(tmp_path)] == [(0, 0.1), (10, 0.5), (20, 0.2)]


def test_a_dead_server_does_not_stall_the_loop_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.tracking.SECONDS_TO_FINISH", 1.0)
    with Outbox(tmp_path, "http://127.0.0.1:1", "some-run") as outbox:
        began = time.monotonic()
        for step in range(100):
            outbox.log(step, {"accuracy": 0.5})
        assert time.monotonic() - began < 1
    assert outbox.unsent == 100
    assert len(read(tmp_path)) == 100


def test_only_the_first_rank_writes(tmp_path, capsys):
    folder = tmp_path / "attempt-1"
    folder.mkdir()
    spec = JobSpec(steps=4, global_batch_size=8)
    task = Task(spec=spec, context=RunContext(job_id="job-1", attempt=1, name="x", folder=str(tmp_path)))
    with open_journal(task, 1) as journal:
        assert isinstance(journal, Silent)
        journal.log(0, {"accuracy": 0.1})
        journal.update(4)
    assert list(folder.iterdir()) == []
    with open_journal(task, 0) as journal:
        journal.log(0, {"accuracy": 0.1})
        journal.update(0)
        journal.update(4)
    assert "step 0/4  accuracy 0.1000" in capsys.readouterr().out
    progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_text())
    assert (progress.step, progress.total_steps, progress.eta_seconds) == (4, 4, 0)
    assert progress.samples_per_second > 0


@pytest.mark.ray
def test_what_is_logged_is_in_mlflow_once(stack, tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient(stack.connection.mlflow_url)
    run_id = client.create_run("0").info.run_id
    for attempt in range(2):  # the second one sends the first one's lines again
        with Outbox(tmp_path, stack.connection.mlflow_url, run_id) as outbox:
            for step in range(1200 * (attempt + 1)):
                outbox.log(step, {"accuracy": step / 10, "loss": float(attempt)})
        assert outbox.unsent == 0
    history = client.get_metric_history(run_id, "accuracy")
    assert [point.step for point in history] == list(range(2400))
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [0.0] * 1200 + [1.0] * 1200
