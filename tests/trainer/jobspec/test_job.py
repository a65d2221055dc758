import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.jobspec import JobSpec, field_path


def test_a_spec_round_trips_through_json():
    spec = JobSpec.model_validate(
        {"steps": 3, "norm": "batch", "optimizer": {"lr": 1}, "data": {"name": "digits"}}
    )
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@given(
    workers=st.integers(1, 40),
    size=st.integers(1, 200),
    norm=st.sampled_from(["none", "batch", "sync", "group", "layer"]),
)
def test_a_batch_is_accepted_exactly_if_every_worker_has_enough_samples_for_its_norm(workers, size, norm):
    least_share = size // workers
    possible = least_share >= (2 if norm == "batch" else 1) and (norm != "sync" or size >= 2)
    try:
        JobSpec.model_validate({"steps": 1, "num_workers": workers, "global_batch_size": size, "norm": norm})
    except ValidationError as error:
        assert not possible
        assert error.errors()[0]["loc"] == ("global_batch_size",)
    else:
        assert possible


TOP5 = {"metrics": ["top5_accuracy"]}


FOLDER = {"name": "imagefolder", "root": "/x"}


STREAM = {"name": "ray", "format": "images", "train": "/x", "test": "/y", "classes": 10, "shape": [3, 8, 8]}


def sgd(**arguments):
    return {"optimizer": {"name": "torch:SGD", "arguments": arguments}}


def cnn(levels):
    return {"name": "cnn", "channels": [4] * levels}


def synthetic(**changes):
    return {"name": "synthetic", "shape": [3, 8, 8], "classes": 10} | changes


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"num_workers": [4, 2]}, "num_workers", r"must be \[min, max\]"),
        ({"num_workers": [2]}, "num_workers", "at least 2 items"),
        ({"accelerator_type": "A100"}, "accelerator_type", "must be used with use_gpu: true .got 'A100'"),
        ({"accelerator_type": "A 100", "use_gpu": True}, "accelerator_type", "match pattern"),
        ({"placement": "strict"}, "placement", "'pack' or 'spread'"),
        ({"num_workers": 4, "sync_group_size": 3}, "sync_group_size", "must be a divisor of the 4 workers"),
        (
            {"num_workers": [2, 4], "sync_group_size": 2},
            "sync_group_size",
            "must be used with a fixed number of workers",
        ),
        (
            {"num_workers": 4, "norm": "batch", "sync_group_size": 2},
            "sync_group_size",
            "must be used with norm 'sync'",
        ),
        (
            {"num_workers": [2, 4], "data_partition": "by_label"},
            "data_partition",
            "must be used with a fixed number of workers",
        ),
        (
            {"num_workers": [2, 4], "norm": "batch", "global_batch_size": 6},
            "global_batch_size",
            "must be between 8 and 4000",
        ),
        (
            {"num_workers": 4, "sync_group_size": 1, "global_batch_size": 6},
            "global_batch_size",
            "must be between 8 and 4000",
        ),
        (
            {"global_batch_size": 10, "gradient_accumulation_steps": 6},
            "gradient_accumulation_steps",
            "each part must have at least 2 samples; 6 parts of 10 samples leave 1",
        ),
        ({"early_stop": {"metric": "f1"}}, "early_stop", "one of evaluation.metrics: accuracy .got 'f1'"),
        (
            {"checkpoint": {"keep_best": "auroc"}},
            "checkpoint",
            "one of evaluation.metrics: accuracy .got 'auroc'",
        ),
        ({"evaluation": {"metrics": ["f1", "f1"]}}, "evaluation.metrics", "must name each metric once"),
        (
            {"model": {"name": "torchvision:resnet18", "arguments": {"weights": "DEFAULT"}}},
            "model.arguments",
            "weights",
        ),
        (
            {"model": {"name": "timm:resnet26", "arguments": {"checkpoint_path": "/x"}}},
            "model.arguments",
            "untrained",
        ),
        ({"model": {"name": "torchvision:../x"}}, "model.name", "pattern"),
        ({"model": {"name": "import:os"}}, "model.name", "pattern"),
        (
            {"data": {"name": "imagefolder", "root": "/x", "train_folder": "../y"}},
            "data.train_folder",
            "pattern",
        ),
        (
            {"data": {"name": "imagefolder", "root": "/x", "train_folder": ".."}},
            "data.train_folder",
            "pattern",
        ),
        ({"data": {"name": "imagefolder", "root": "/x", "test_folder": "."}}, "data.test_folder", "pattern"),
        ({"max_train_seconds": 0}, "max_train_seconds", "greater than 0"),
        (sgd(nesterov=True), "optimizer.arguments", "nesterov must have a momentum above 0"),
        (sgd(nesterov=True, momentum=0.9, dampening=0.1), "optimizer.arguments", "no dampening"),
        (sgd(fused=True, foreach=True), "optimizer.arguments", "fused must be false together with foreach"),
        (
            {"data": {"name": "digits", "transform": {"mean": [0.1] * 3}}},
            "data.transform",
            "each of 1 channels",
        ),
        (
            {"data": {"name": "mnist5k", "transform": {"channels": 3, "std": [1.0, 1.0]}}},
            "data.transform",
            "of 3 channels",
        ),
        ({"data": FOLDER | {"transform": {"std": [1.0, 2.0]}}}, "data.transform", "each of 3 channels"),
        (
            {"data": STREAM | {"shape": [1, 8, 8], "transform": {"mean": [0.1] * 3}}},
            "data.transform",
            "of 1 channels",
        ),
        ({"data": STREAM | {"classes": 5}, "evaluation": TOP5}, "evaluation", "more than 5 classes .got 5"),
        ({"data": synthetic(classes=3), "evaluation": TOP5}, "evaluation", "more than 5 classes .got 3"),
        ({"model": cnn(5), "data": {"name": "digits"}}, "data", "8x8 must have at most 4 levels .* .got 5"),
        ({"model": cnn(6)}, "data", "28x28 must have at most 5 levels .* .got 6"),
        ({"model": cnn(2), "data": synthetic(shape=[12])}, "data", "must be images for model 'cnn'"),
        ({"activation_checkpointing": True}, "activation_checkpointing", "must be false for model 'mlp'"),
        (
            {"model": cnn(1), "activation_checkpointing": True},
            "activation_checkpointing",
            "must be false for model 'cnn'",
        ),
        ({"probes": {"layers": ["norm4"]}}, "probes", "layers must be among flatten, linear1.* .got norm4"),
        (
            {"model": cnn(2), "probes": {"layers": ["pool2"]}},
            "probes",
            "layers must be among conv1.* .got pool2",
        ),
        (
            {"optimizer": {"name": "torch:Adafactor"}, "parallel": "fsdp"},
            "parallel",
            "must be 'ddp' for optimizer",
        ),
        (sgd(fused=True) | {"parallel": "fsdp"}, "parallel", "'torch:SGD' with fused"),
        ({"early_stop": {"target": 95}}, "early_stop.target", "a share above 0 and at most 1 .got 95"),
        ({"early_stop": {"target": 0}}, "early_stop.target", "a share above 0 and at most 1 .got 0"),
        ({"early_stop": {"metric": "test_loss", "target": 0}}, "early_stop.target", "above 0 .got 0"),
    ],
)
def test_inconsistent_fields_are_named(changes, field, rule):
    content = {"steps": 1} | changes
    with pytest.raises(ValidationError, match=rule) as error:
        JobSpec.model_validate(content)
    assert [field_path(item["loc"], content) for item in error.value.errors()] == [field]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": [2, 4]},
        {"num_workers": 4, "sync_group_size": 2},
        {
            "evaluation": {"metrics": ["accuracy", "f1"]},
            "early_stop": {"metric": "f1"},
            "checkpoint": {"keep_best": "f1"},
        },
        {"early_stop": {"metric": "test_loss", "mode": "min"}},
        {"model": {"hidden": [3]}},
        {
            "data": {"name": "digits", "transform": {"resize": 32, "channels": 3}},
            "model": {"name": "timm:resnet26"},
        },
    ],
)
def test_consistent_specs_round_trip_through_json(changes):
    spec = JobSpec.model_validate({"steps": 1} | changes)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.min_workers <= spec.max_workers
