import socket
import threading
import time

import pytest
import torch

from tests.trainer.factories import make_spec, run_here
from tests.trainer.tracking.tracked import read, whole
from trainer.errors import ConfigurationError
from trainer.tracking.logger import RankZeroLogger
from trainer.tracking.outbox import OUTBOX_FILE, Outbox, read_lines
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.uploader import MAX_UPLOAD_ATTEMPTS, MlflowUploader, TrackingProcess


def drain(outbox, url, run_id, seconds=60.0):
    """Upload the content of an outbox, and return the bytes that were not sent."""
    with MlflowUploader(outbox.path, url, run_id) as tracking:
        tracking.seconds_to_finish = seconds
    return tracking.unsent_bytes


@pytest.mark.parametrize(
    "damage", [b"\0\0\0\n", b"\xff\xfe{\n", b'["a list"]\n', b"{}\n", b'{"kind": "evalu']
)
def test_unreadable_lines_are_skipped_without_losing_later_ones(tmp_path, damage):
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


def test_a_dead_server_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outbox = Outbox(tmp_path)
    for step in range(100):
        outbox.log(step, {"accuracy": 0.5})
    outbox.close()
    assert drain(outbox, "http://127.0.0.1:1", "some-run", 1.0) == len(whole(tmp_path))
    assert len(read(tmp_path)) == 100


def test_artifacts_wait_for_a_dead_server_regardless_of_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.tracking.uploader.UPLOAD_INTERVAL_SECONDS", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    outbox = Outbox(tmp_path)
    outbox.put("tags", tags={"norm": "sync"})
    outbox.put("model", path=str(tmp_path), step=3)
    outbox.close()
    attempts = []
    monkeypatch.setattr(
        "trainer.tracking.uploader._send", lambda *_: attempts.append(1) or refuse_connection()
    )
    with MlflowUploader(outbox.path, "http://127.0.0.1:1", "some-run") as tracking:
        tracking.seconds_to_finish = 0
        deadline = time.monotonic() + 30
        while len(attempts) <= MAX_UPLOAD_ATTEMPTS:
            assert time.monotonic() < deadline, f"the upload ended after {len(attempts)} attempts"
            time.sleep(0.01)
    assert tracking.unsent_bytes == len(whole(tmp_path))


def refuse_connection():
    raise ConnectionRefusedError


def test_metrics_of_another_run_are_not_mixed(tmp_path):
    first = Outbox(tmp_path)
    first.belong_to({"optimizer": "0.1", "seed": "0"})
    first.log(10, {"accuracy": 0.5})
    first.close()
    same, other = Outbox(tmp_path), Outbox(tmp_path)
    same.belong_to({"optimizer": "0.1", "seed": "0"})
    with pytest.raises(
        ConfigurationError, match=r"optimizer: must be as at the start of this run, 0.1; .*\(got '0.2'\)"
    ):
        other.belong_to({"optimizer": "0.2", "seed": "0"})
    same.close()
    other.close()
    assert [line["kind"] for line in read(tmp_path)] == ["identity", "evaluation"]


class SilentServer:
    """Server that accepts connections and never answers."""

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


def test_a_silent_server_delays_only_the_end_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.tracking.uploader.FINISH_TIMEOUT_SECONDS", -29.0
    )  # for the process, which gets 30 more
    spec = make_spec(steps=200, eval_every=1, precision="fp32")
    outbox, pauses = Outbox(tmp_path), []
    append = outbox._append

    def timed(line):
        began = time.perf_counter()
        append(line)
        pauses.append(time.perf_counter() - began)

    monkeypatch.setattr(outbox, "_append", timed)
    with SilentServer() as url:
        began = time.monotonic()
        with TrackingProcess(tmp_path, url, "some-run") as process:
            run_here(
                spec,
                metrics_logger=RankZeroLogger(spec.steps, outbox, ProgressFile(tmp_path, spec.steps, 50)),
            )
            trained = time.monotonic() - began
        assert time.monotonic() - began < trained + 10
    outbox.close()
    assert process._process.poll() is not None
    assert len(pauses) == len(read(tmp_path)) == 201
    assert max(pauses) < 0.05
    assert not (tmp_path / "metrics.sent").exists()


@pytest.mark.ray
def test_every_logged_metric_is_in_mlflow_once(stack, tmp_path):
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
            outbox.log(7, {"no such: name?": 1.0}, "probes")  # rejected by MLflow, alone
            outbox.log(8, {"probe/loss_range": 1.0}, "probes")
            outbox.put("artifact", path=str(tmp_path / "figure.png"), folder="figures")
            outbox.put("artifact", path=str(tmp_path / "gone.png"), folder="figures")  # reported, and skipped
        outbox.close()
        run, place = (tmp_path / "metrics.sent").read_text().split()
        assert (run, int(place)) == (run_id, len(whole(tmp_path)))
        if attempt == 0:  # the next process uploads all of it again
            (tmp_path / "metrics.sent").unlink()
    history = client.get_metric_history(run_id, "accuracy")
    assert sorted(point.step for point in history) == list(range(2400))
    assert (
        sorted(point.value for point in client.get_metric_history(run_id, "loss"))
        == [0.0] * 1200 + [1.0] * 1200
    )
    assert [point.step for point in client.get_metric_history(run_id, "probe/loss_range")] == [8]
    run = client.get_run(run_id)
    assert run.data.tags["workers"] == "2"
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert [(item.dataset.name, item.dataset.digest) for item in run.inputs.dataset_inputs] == [
        ("digits", "abc")
    ]
    assert [item.path for item in client.list_artifacts(run_id, "figures")] == ["figures/figure.png"]


@pytest.mark.ray
def test_a_killed_trainer_leaves_no_uploader(stack, tmp_path):
    from mlflow import MlflowClient

    run_id = MlflowClient(stack.mlflow[0]).create_run("0").info.run_id
    with TrackingProcess(tmp_path, stack.mlflow[0], run_id) as process:
        outbox = Outbox(tmp_path)
        outbox.log(0, {"accuracy": 0.5})
        outbox.close()
        process._process.stdin.close()  # like the end of the trainer, without a stop signal
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

    spec = make_spec(
        model={"name": "torchvision:resnet18"},
        data={"name": "digits", "transform": {"resize": 32, "channels": 3}},
        steps=1,
        precision="fp32",
        global_batch_size=8,
        evaluation={"batch_size": 360},
    )
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
