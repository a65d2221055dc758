import json
import socket
import threading
import time

import pytest
import torch

from tests.trainer.training import make_spec, run_here
from trainer.journal import RankZeroJournal, Silent, open_journal
from trainer.outbox import OUTBOX_FILE, Outbox
from trainer.progress import ProgressFile
from trainer.spec import PROGRESS_FILE, JobSpec, Progress, RunContext, Task
from trainer.tracking import SENT_FILE, Tracking


def read(folder):
    return [json.loads(line) for line in (folder / OUTBOX_FILE).read_text().splitlines()]


def test_without_a_run_the_metrics_stay_in_the_file(tmp_path):
    outbox = Outbox(tmp_path)
    with Tracking(outbox, None, None) as tracking:
        outbox.log(0, {"accuracy": 0.1})
        outbox.log(10, {"accuracy": 0.5, "loss": 1.0})
    outbox.close()
    assert [(line["step"], line["metrics"]) for line in read(tmp_path)] == [
        (0, {"accuracy": 0.1}),
        (10, {"accuracy": 0.5, "loss": 1.0}),
    ]
    assert tracking.unsent_bytes == 0


def test_another_attempt_logs_no_step_again_of_its_kind(tmp_path):
    first = Outbox(tmp_path)
    first.log(0, {"accuracy": 0.1})
    first.log(10, {"accuracy": 0.5})
    first.log(4, {"probe/loss_range": 1.0}, "probes")
    first.close()
    with (tmp_path / OUTBOX_FILE).open("a") as file:
        file.write('{"step": 20, "timest')  # killed while writing
    second = Outbox(tmp_path)
    for step in (0, 10, 20):
        second.log(step, {"accuracy": step / 100})
        second.log(step, {"probe/loss_range": 2.0}, "probes")
    assert second.next_step("system") == 0
    second.close()
    lines = [(line["kind"], line["step"], *line["metrics"].values()) for line in read(tmp_path)]
    assert [line[1:] for line in lines if line[0] == "evaluation"] == [(0, 0.1), (10, 0.5), (20, 0.2)]
    assert [line[1:] for line in lines if line[0] == "probes"] == [(4, 1.0), (10, 2.0), (20, 2.0)]


def test_a_dead_server_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.tracking.SECONDS_TO_FINISH", 1.0)
    outbox = Outbox(tmp_path)
    with Tracking(outbox, "http://127.0.0.1:1", "some-run") as tracking:
        for step in range(100):
            outbox.log(step, {"accuracy": 0.5})
    outbox.close()
    assert tracking.unsent_bytes == outbox.length > 0
    assert len(read(tmp_path)) == 100


class Deaf:
    """A server that takes connections and never answers."""

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.taken = []
        threading.Thread(target=self._take, daemon=True).start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _take(self):
        try:
            while True:
                self.taken.append(self.socket.accept()[0])
        except OSError:
            return

    def __exit__(self, *_):
        self.socket.close()
        for connection in self.taken:
            connection.close()


def test_a_server_that_does_not_answer_delays_no_step(tmp_path, monkeypatch):
    spec = make_spec(steps=300, eval_every=1, precision="fp32")
    monkeypatch.setattr("trainer.tracking.SECONDS_TO_FINISH", 0.5)
    outbox, pauses = Outbox(tmp_path), []
    append = outbox._append

    def timed(line):
        began = time.perf_counter()
        append(line)
        pauses.append(time.perf_counter() - began)

    monkeypatch.setattr(outbox, "_append", timed)
    with Deaf() as url, Tracking(outbox, url, "some-run") as tracking:
        run_here(spec, journal=RankZeroJournal(spec.steps, outbox, ProgressFile(tmp_path, spec.steps, 50)))
    outbox.close()
    assert tracking.unsent_bytes == outbox.length
    assert len(pauses) == len(read(tmp_path)) == 301
    assert max(pauses) < 0.05


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
    (tmp_path / "figure.png").write_bytes(b"not really")
    for attempt in range(2):
        outbox = Outbox(tmp_path)
        with Tracking(outbox, stack.connection.mlflow_url, run_id) as tracking:
            outbox.put("tags", tags={"workers": attempt + 1})
            outbox.put("dataset", name="digits", digest="abc", source="digits")
            for step in range(1200 * (attempt + 1)):
                outbox.log(step, {"accuracy": step / 10, "loss": float(attempt)})
            outbox.log(7, {"probe/loss_range": 1.0}, "probes")
            outbox.put("artifact", path=str(tmp_path / "figure.png"), folder="figures")
            outbox.put("artifact", path=str(tmp_path / "gone.png"), folder="figures")  # told of, and passed by
        outbox.close()
        assert tracking.unsent_bytes == 0
        if attempt == 0:  # the next one sends all of it again
            (tmp_path / SENT_FILE).unlink()
    history = client.get_metric_history(run_id, "accuracy")
    assert [point.step for point in history] == list(range(2400))
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [0.0] * 1200 + [1.0] * 1200
    assert [point.step for point in client.get_metric_history(run_id, "probe/loss_range")] == [7]
    run = client.get_run(run_id)
    assert run.data.tags["workers"] == "2"
    assert [(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs] == [("digits", "abc")]
    assert [item.path for item in client.list_artifacts(run_id, "figures")] == ["figures/figure.png"]


FRESH = """
import sys
sys.modules["syncbn"] = sys.modules["trainer"] = None
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model(f"runs:/{sys.argv[2]}/model")
example = torch.load(sys.argv[3])
torch.save(model(example), sys.argv[4])
print([type(module).__name__ for module in model.modules()])
"""


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:.*AnyType:UserWarning")
def test_the_model_is_logged_once_and_loads_without_this_project(stack, tmp_path):
    import subprocess
    import sys

    from mlflow import MlflowClient

    from syncbn import SyncBatchNorm
    from trainer.export import export_model

    spec = make_spec(model={"name": "torchvision:resnet18"}, data={"name": "digits", "transform": {"resize": 32, "channels": 3}},
                     steps=1, precision="fp32", global_batch_size=8, evaluation={"batch_size": 360})  # fmt: skip
    result, _ = run_here(spec)
    assert any(isinstance(module, SyncBatchNorm) for module in result.model.modules())
    example = torch.rand(2, 3, 32, 32)
    assert export_model(spec, result.model.state_dict(), (3, 32, 32), 10, example, tmp_path / "model")
    client = MlflowClient(stack.connection.mlflow_url)
    run = client.create_run("0").info
    for _ in range(2):
        outbox = Outbox(tmp_path)
        with Tracking(outbox, stack.connection.mlflow_url, run.run_id) as tracking:
            outbox.put("model", path=str(tmp_path / "model"), step=1)
        outbox.close()
        assert tracking.unsent_bytes == 0
    assert len(client.search_logged_models([run.experiment_id], filter_string=f"source_run_id = '{run.run_id}'")) == 1
    torch.save(example, tmp_path / "example.pt")
    command = [sys.executable, "-c", FRESH, stack.connection.mlflow_url, run.run_id, "example.pt", "outputs.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "BatchNorm2d" in done.stdout
    assert "SyncBatchNorm" not in done.stdout
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert (outputs - result.model.eval()(example)).abs().max() < 1e-5
