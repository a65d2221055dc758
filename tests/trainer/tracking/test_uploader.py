import json
import socket
import threading
import time

import pytest
import torch

from tests.trainer.factories import make_spec, run_here
from trainer.errors import ConfigurationError
from trainer.jobspec import PROGRESS_FILE, AttemptContext, JobSpec, Progress, Task
from trainer.tracking.logger import NullLogger, RankZeroLogger, open_journal
from trainer.tracking.outbox import OUTBOX_FILE, Outbox, read_lines
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.uploader import MOST_TRIES, MlflowUploader, TrackingProcess


def read(folder):
    return [json.loads(line) for line in (folder / OUTBOX_FILE).read_text().splitlines()]


def drain(outbox, url, run_id, seconds=60.0):
    """Send what an outbox holds, and return the bytes that did not arrive."""
    with MlflowUploader(outbox.path, url, run_id) as tracking:
        tracking.seconds_to_finish = seconds
    return tracking.unsent_bytes


def test_the_outbox_is_a_file_of_lines(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.log(0, {"accuracy": 0.1})
    outbox.log(10, {"accuracy": 0.5, "loss": 1.0})
    outbox.close()
    assert [(line["step"], line["metrics"]) for line in read(tmp_path)] == [
        (0, {"accuracy": 0.1}),
        (10, {"accuracy": 0.5, "loss": 1.0}),
    ]


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
    lines = [(line["kind"], line["step"], *line["metrics"].values()) for line in read_lines(whole(tmp_path))]
    assert [line[1:] for line in lines if line[0] == "evaluation"] == [(0, 0.1), (10, 0.5), (20, 0.2)]
    assert [line[1:] for line in lines if line[0] == "probes"] == [(4, 1.0), (10, 2.0), (20, 2.0)]


def whole(folder):
    return (folder / OUTBOX_FILE).read_bytes()


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"\xff\xfe{\n", b'["a list"]\n', b"{}\n", b'{"kind": "evalu'])
def test_what_cannot_be_read_is_passed_by_and_what_follows_is_not_lost(tmp_path, damage):
    first = Outbox(tmp_path)
    first.log(0, {"accuracy": 0.1})
    first.close()
    with (tmp_path / OUTBOX_FILE).open("ab") as file:
        file.write(damage)
    second = Outbox(tmp_path)
    second.log(0, {"accuracy": 0.9})
    second.log(10, {"accuracy": 0.2})
    second.close()
    assert [(line["step"], line["metrics"]["accuracy"]) for line in read_lines(whole(tmp_path))] == [
        (0, 0.1),
        (10, 0.2),
    ]


def test_a_dead_server_loses_nothing(tmp_path):
    outbox = Outbox(tmp_path)
    for step in range(100):
        outbox.log(step, {"accuracy": 0.5})
    outbox.close()
    assert drain(outbox, "http://127.0.0.1:1", "some-run", 1.0) == len(whole(tmp_path))
    assert len(read(tmp_path)) == 100


def test_what_is_no_metric_waits_for_a_dead_server_however_often_it_was_tried(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.tracking.uploader.SECONDS_BETWEEN_CALLS", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outbox = Outbox(tmp_path)
    outbox.put("tags", tags={"norm": "sync"})
    outbox.put("model", path=str(tmp_path), step=3)
    outbox.close()
    tries = []
    monkeypatch.setattr("trainer.tracking.uploader._send", lambda *_: tries.append(1) or refuse_connection())
    assert drain(outbox, "http://127.0.0.1:1", "some-run", 8.0) == len(whole(tmp_path))
    assert len(tries) > MOST_TRIES


def refuse_connection():
    raise ConnectionRefusedError


def test_another_run_does_not_mix_its_metrics_into_those_there_are(tmp_path):
    first = Outbox(tmp_path)
    first.belong_to({"optimizer": "0.1", "seed": "0"})
    first.log(10, {"accuracy": 0.5})
    first.close()
    same, other = Outbox(tmp_path), Outbox(tmp_path)
    same.belong_to({"optimizer": "0.1", "seed": "0"})
    with pytest.raises(
        ConfigurationError, match=r"optimizer: must be as at the start of this run, 0.1, .*\(got '0.2'\)"
    ):
        other.belong_to({"optimizer": "0.2", "seed": "0"})
    same.close()
    other.close()
    assert [line["kind"] for line in read(tmp_path)] == ["identity", "evaluation"]


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


def test_a_server_that_does_not_answer_holds_up_nothing_but_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.tracking.uploader.SECONDS_TO_FINISH", -29.0)  # for the process, which gets 30 more
    spec = make_spec(steps=200, eval_every=1, precision="fp32")
    outbox, pauses = Outbox(tmp_path), []
    append = outbox._append

    def timed(line):
        began = time.perf_counter()
        append(line)
        pauses.append(time.perf_counter() - began)

    monkeypatch.setattr(outbox, "_append", timed)
    with Deaf() as url:
        began = time.monotonic()
        with TrackingProcess(tmp_path, url, "some-run") as process:
            run_here(spec, journal=RankZeroLogger(spec.steps, outbox, ProgressFile(tmp_path, spec.steps, 50)))
            trained = time.monotonic() - began
        assert time.monotonic() - began < trained + 10
    outbox.close()
    assert process._process.poll() is not None
    assert len(pauses) == len(read(tmp_path)) == 201
    assert max(pauses) < 0.05
    assert not (tmp_path / "metrics.sent").exists()


def test_only_the_first_rank_writes(tmp_path, capsys):
    folder = tmp_path / "attempt-1"
    folder.mkdir()
    spec = JobSpec(steps=4, global_batch_size=8)
    task = Task(spec=spec, context=AttemptContext(job_id="job-1", attempt=1, name="x", folder=str(tmp_path)))
    with open_journal(task, 1) as journal:
        assert isinstance(journal, NullLogger)
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

    client = MlflowClient(stack.mlflow[0])
    run_id = client.create_run("0").info.run_id
    (tmp_path / "figure.png").write_bytes(b"not really")
    for attempt in range(2):
        outbox = Outbox(tmp_path)
        with TrackingProcess(tmp_path, stack.mlflow[0], run_id):
            outbox.put("tags", tags={"workers": attempt + 1})
            outbox.put("dataset", name="digits", digest="abc", source="digits")
            for step in range(1200 * (attempt + 1)):
                outbox.log(step, {"accuracy": step / 10, "loss": float(attempt)})
            outbox.log(7, {"no such: name?": 1.0}, "probes")  # refused by MLflow, alone
            outbox.log(8, {"probe/loss_range": 1.0}, "probes")
            outbox.put("artifact", path=str(tmp_path / "figure.png"), folder="figures")
            outbox.put("artifact", path=str(tmp_path / "gone.png"), folder="figures")  # told of, and passed by
        outbox.close()
        run, place = (tmp_path / "metrics.sent").read_text().split()
        assert (run, int(place)) == (run_id, len(whole(tmp_path)))
        if attempt == 0:  # the next one sends all of it again
            (tmp_path / "metrics.sent").unlink()
    history = client.get_metric_history(run_id, "accuracy")
    assert sorted(point.step for point in history) == list(range(2400))
    assert sorted(point.value for point in client.get_metric_history(run_id, "loss")) == [0.0] * 1200 + [1.0] * 1200
    assert [point.step for point in client.get_metric_history(run_id, "probe/loss_range")] == [8]
    run = client.get_run(run_id)
    assert run.data.tags["workers"] == "2"
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert [(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs] == [("digits", "abc")]
    assert [item.path for item in client.list_artifacts(run_id, "figures")] == ["figures/figure.png"]


@pytest.mark.ray
def test_a_trainer_that_is_killed_leaves_no_tracking_behind(stack, tmp_path):
    from mlflow import MlflowClient

    run_id = MlflowClient(stack.mlflow[0]).create_run("0").info.run_id
    with TrackingProcess(tmp_path, stack.mlflow[0], run_id) as process:
        outbox = Outbox(tmp_path)
        outbox.log(0, {"accuracy": 0.5})
        outbox.close()
        process._process.stdin.close()  # as the end of the trainer does, without a word
        assert process._process.wait(30) == 0
        process._process.stdin = None
    assert MlflowClient(stack.mlflow[0]).get_run(run_id).data.metrics["accuracy"] == 0.5


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
    from trainer.data import open_dataset
    from trainer.export import export_model

    spec = make_spec(model={"name": "torchvision:resnet18"}, data={"name": "digits", "transform": {"resize": 32, "channels": 3}},
                     steps=1, precision="fp32", global_batch_size=8, evaluation={"batch_size": 360})  # fmt: skip
    result, _ = run_here(spec)
    assert any(isinstance(module, SyncBatchNorm) for module in result.model.modules())
    example = torch.rand(2, 3, 32, 32)
    dataset = open_dataset(spec, 0, 1, torch.device("cpu"), torch.float32)
    assert export_model(spec, result.model.state_dict(), dataset, example, tmp_path / "model")
    client = MlflowClient(stack.mlflow[0])
    run = client.create_run("0").info
    for _ in range(2):
        outbox = Outbox(tmp_path)
        outbox.put("model", path=str(tmp_path / "model"), step=1)
        outbox.put("model", path=str(tmp_path / "model"), step=1, name="model-last")
        outbox.close()
        assert drain(outbox, stack.mlflow[0], run.run_id) == 0
    models = client.search_logged_models([run.experiment_id], filter_string=f"source_run_id = '{run.run_id}'")
    assert sorted(model.name for model in models) == ["model", "model-last"]
    torch.save(example, tmp_path / "example.pt")
    command = [sys.executable, "-c", FRESH, stack.mlflow[0], run.run_id, "example.pt", "outputs.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "BatchNorm2d" in done.stdout
    assert "SyncBatchNorm" not in done.stdout
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert (outputs - result.model.eval()(example)).abs().max() < 1e-5
