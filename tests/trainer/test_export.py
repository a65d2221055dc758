"""Exported models equal the evaluated ones: weights and statistics, of the best or last step."""

import json
from dataclasses import dataclass

import mlflow.models
import mlflow.pytorch
import onnx
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from syncbn import revert_sync_batchnorm
from tests.dist import run_on_ranks
from tests.trainer.data.image_files import write_images
from tests.trainer.factories import RecordingLogger, here, make_spec
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress
from trainer.data import open_dataset
from trainer.errors import ExportError
from trainer.export import collect_models, export_model, write_onnx
from trainer.failures import read
from trainer.jobspec import AttemptContext, AttemptTask, ImageFolderSpec, attempt_folder
from trainer.models import build_model
from trainer.tracking.outbox import Outbox, read_lines
from trainer.training.loop import NoNotices, train
from trainer.worker import _train, export, identity


@dataclass
class Run:
    """Finished run and its exporter."""

    models: list
    metrics: dict


def run_and_export(spec, folder):
    worker, position, notes = here(), TrainProgress(), RecordingLogger()
    dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, torch.float64)
    checkpoints = Checkpoints(str(folder), spec.checkpoint, identity(spec, dataset.digest), worker)
    result = train(spec, worker, notes, dataset, checkpoints, position=position)
    models = collect_models(spec, result.model, position, checkpoints, worker)
    assert not dist.is_initialized() or dist.get_rank() == 0 or not models
    return Run(models, notes.metrics)


def measure(spec, weights):
    """Evaluate an exported model as a user who loads it."""
    dataset = open_dataset(make_spec(), 0, 1, torch.device("cpu"), torch.float64)
    model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, 0).double()
    model.load_state_dict(weights)
    [batch] = dataset.test()
    with torch.no_grad():
        logits = revert_sync_batchnorm(model).eval()(batch.inputs)
    return {
        "test_loss": float(F.cross_entropy(logits, batch.labels)),
        "accuracy": float((logits.argmax(1) == batch.labels).double().mean()),
    }


def assert_measures(spec, model, metrics):
    for name, value in measure(spec, model.weights).items():
        assert value == pytest.approx(metrics[model.step][name], abs=1e-9), (model.which, name)


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "sync"])
@pytest.mark.parametrize("statistics", ["moving", "precise"])
def test_the_exported_model_reproduces_the_metrics_of_the_run(tmp_path, statistics, norm, world_size):
    evaluation = {"statistics": statistics, "precise_batches": 4}
    spec = make_spec(norm=norm, global_batch_size=8, evaluation=evaluation, num_workers=world_size)
    arguments = (spec, tmp_path)
    run = run_on_ranks(run_and_export, 2, *arguments)[0] if world_size > 1 else run_and_export(*arguments)
    [model] = run.models
    assert (model.name, model.which, model.step) == ("model", "last", 20)
    assert_measures(spec, model, run.metrics)


CHECKPOINT = {"keep_best": "test_loss", "best_mode": "max"}  # of a decreasing loss: an early step


@pytest.mark.parametrize(
    ("export", "names"),
    [("best", {"model": "best", "model-last": "last"}), ("last", {"model": "last", "model-best": "best"})],
)
def test_the_best_and_the_last_model_are_exported(tmp_path, export, names):
    spec = make_spec(
        checkpoint=CHECKPOINT | {"export": export}, evaluation={"statistics": "precise"}, eval_every=5
    )
    run = run_and_export(spec, tmp_path)
    assert {model.name: model.which for model in run.models} == names
    losses = {step: values["test_loss"] for step, values in run.metrics.items() if step > 0}
    assert {model.which: model.step for model in run.models} == {
        "best": max(losses, key=losses.get),
        "last": 20,
    }
    assert run.models[0].name == "model"
    for model in run.models:
        assert_measures(spec, model, run.metrics)


def test_a_model_both_last_and_best_is_exported_once(tmp_path):
    spec = make_spec(checkpoint={"keep_best": "test_loss"})
    run = run_and_export(spec, tmp_path)
    assert [(model.name, model.which, model.step) for model in run.models] == [("model", "best", 20)]


def test_statistics_of_the_evaluation_survive_a_resumption(tmp_path):
    spec = make_spec(evaluation={"statistics": "precise"})
    first, again = run_and_export(spec, tmp_path), run_and_export(spec, tmp_path)
    assert again.metrics == {}
    assert_measures(spec, again.models[0], first.metrics)


def test_an_unreadable_best_checkpoint_falls_back_to_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoints, "manifests", lambda _: iter([][0]))
    spec = make_spec(checkpoint=CHECKPOINT)
    worker, position = here(), TrainProgress()
    checkpoints = Checkpoints(str(tmp_path), spec.checkpoint, {}, worker)
    [model] = collect_models(spec, torch.nn.Linear(1, 1), position, checkpoints, worker)
    assert model.which == "last"
    assert "exporting the last model instead of the best" in capsys.readouterr().out


@pytest.fixture
def run_attempt(tmp_path, monkeypatch):
    """Run an attempt of a job in this process without Ray."""
    monkeypatch.setattr("trainer.worker.RayNotices", lambda _: NoNotices())
    monkeypatch.setattr(
        "trainer.worker.hide_credentials", lambda: None
    )  # of this process, which other tests need

    def run(number):
        folder = attempt_folder(tmp_path, number)
        folder.mkdir()
        context = AttemptContext(job_id="job-1", attempt=number, name="test", folder=str(tmp_path))
        task = AttemptTask(spec=make_spec(checkpoint={"every": None}), context=context)
        return _train(task, here(), TrainProgress(), None, folder)

    return run


def evaluations(folder):
    lines = list(read_lines((folder / "metrics.jsonl").read_bytes()))
    return [line for line in lines if line["kind"] == "evaluation"]


def fail(*_, **__):
    raise RuntimeError(
        "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
    )  # torch's error of a full disk


@pytest.mark.parametrize(
    "step", ["trainer.worker.write_figures", "trainer.data.memory.InMemoryDataset.close"]
)
def test_a_run_whose_last_report_fails_succeeds_with_a_warning(
    run_attempt, tmp_path, monkeypatch, capsys, step
):
    monkeypatch.setattr(step, fail)
    assert run_attempt(1)["reason"] == "finished 20 steps"
    assert (attempt_folder(tmp_path, 1) / "model.pt").exists()
    assert "warning: could not" in capsys.readouterr().out


def test_a_failed_export_is_retried_without_training_again(run_attempt, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("trainer.worker.write_weights", fail)
        with pytest.raises(
            ExportError, match=r"training is complete \(20 steps\), but its model could not be written"
        ):
            run_attempt(1)
    [failure] = read(attempt_folder(tmp_path, 1))
    assert (failure.cause, failure.step) == ("export", 20)
    assert not (attempt_folder(tmp_path, 1) / "model.pt").exists()
    measured = evaluations(tmp_path)
    capsys.readouterr()
    assert run_attempt(2)["reason"] == "finished 20 steps"
    assert "step 20/20" not in capsys.readouterr().out  # nothing is trained or evaluated again
    assert (attempt_folder(tmp_path, 2) / "model.pt").exists()
    assert evaluations(tmp_path) == measured != []


@pytest.mark.filterwarnings("ignore")  # of torch's exporter and of MLflow
def test_the_exported_model_has_preprocessing_and_class_names(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.dataloader.count_processes", lambda _: 0)
    transform = {"resize": 9, "crop": 8, "flip": True, "mean": [0.1, 0.2, 0.3], "std": [0.5]}
    root = write_images(tmp_path / "data")
    spec = make_spec(
        data=ImageFolderSpec(root=str(root), transform=transform), precision="fp32", global_batch_size=4
    )
    dataset = open_dataset(spec, 0, 1, torch.device("cpu"), torch.float32)
    weights = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, 0).state_dict()
    example = next(iter(dataset.test())).inputs
    assert export_model(spec, weights, dataset, example, tmp_path / "model")
    expected = {
        "class_names": ["cat", "dog"],
        "transform": {"resize": 9, "crop": 8, "channels": None, "mean": [0.1, 0.2, 0.3], "std": [0.5]},
    }
    assert mlflow.models.Model.load(str(tmp_path / "model")).metadata == expected
    write_onnx(tmp_path / "model", tmp_path / "model.onnx")
    properties = onnx.load(tmp_path / "model.onnx").metadata_props
    assert {entry.key: json.loads(entry.value) for entry in properties} == expected


def test_a_model_that_cannot_be_rebuilt_is_not_exported_and_the_run_succeeds(tmp_path, capsys):
    spec = make_spec(model={"name": "import:tests.trainer.networks:renamed"}, norm="none", steps=2)
    models = run_and_export(spec, tmp_path / "checkpoints").models
    dataset = open_dataset(spec, 0, 1, torch.device("cpu"), torch.float64)
    outbox = Outbox(tmp_path)
    export(spec, models, dataset, outbox, tmp_path)
    outbox.close()
    assert [line["kind"] for line in read_lines((tmp_path / "metrics.jsonl").read_bytes())] == ["tags"]
    assert (tmp_path / "model.pt").exists()
    assert (
        "the model is not logged to MLflow: RuntimeError: Error(s) in loading state_dict"
        in capsys.readouterr().out
    )


@pytest.mark.filterwarnings("ignore:.*AnyType:UserWarning")
def test_both_models_are_logged_to_mlflow(tmp_path, capsys):
    spec = make_spec(norm="batch", checkpoint=CHECKPOINT, eval_every=5, evaluation={"statistics": "batch"})
    models = run_and_export(spec, tmp_path / "checkpoints").models
    dataset = open_dataset(spec, 0, 1, torch.device("cpu"), torch.float64)
    outbox = Outbox(tmp_path)
    export(spec, models, dataset, outbox, tmp_path)
    outbox.close()
    lines = list(read_lines((tmp_path / "metrics.jsonl").read_bytes()))
    assert lines[0]["tags"] == {"exported_model": "best, step 5"}
    assert [(line["name"], line["step"]) for line in lines[1:]] == [("model", 5), ("model-last", 20)]
    for model in models:
        loaded = mlflow.pytorch.load_model(str(tmp_path / model.name))
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.weights[name]), (model.name, name)
    assert "the exported model uses moving averages" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "cnn", "channels": [4, 8]}, "norm": "sync"},
        {"model": {"name": "timm:resnet10t"}, "norm": "sync"},
        {"model": {"name": "mlp", "hidden": [8]}, "norm": "group"},
    ],
    ids=["cnn", "timm", "mlp"],
)
@pytest.mark.filterwarnings("ignore")  # of torch's exporter and of MLflow
def test_the_onnx_export_accepts_any_batch_size(tmp_path, changes):
    from onnx.reference import ReferenceEvaluator

    data = {"name": "synthetic", "shape": [3, 32, 32], "classes": 4, "train_samples": 16, "test_samples": 8}
    spec = make_spec(data=data, precision="fp32", global_batch_size=4, **changes)
    dataset = open_dataset(spec, 0, 1, torch.device("cpu"), torch.float32)
    weights = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, 0).state_dict()
    inputs = next(iter(dataset.test())).inputs
    assert export_model(spec, weights, dataset, inputs[:2], tmp_path / "model")
    write_onnx(tmp_path / "model", tmp_path / "model.onnx")
    content = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(content)
    properties = {entry.key: entry.value for entry in content.metadata_props}
    assert json.loads(properties["class_names"]) == list(dataset.class_names)
    model = mlflow.pytorch.load_model(str(tmp_path / "model")).eval()
    for count in (1, 3, 8):
        (found,) = ReferenceEvaluator(content).run(None, {"inputs": inputs[:count].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(inputs[:count]), rtol=1e-4, atol=1e-5)
