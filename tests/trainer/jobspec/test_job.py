import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.jobspec import JobSpec, field_path, read_yaml, spec_warnings


def test_a_spec_survives_being_written_and_read():
    spec = JobSpec.model_validate({"steps": 3, "norm": "batch", "optimizer": {"lr": 1}, "data": {"name": "digits"}})
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


@given(
    workers=st.integers(1, 40),
    size=st.integers(1, 200),
    norm=st.sampled_from(["none", "batch", "sync", "group", "layer"]),
)
def test_a_batch_is_taken_exactly_if_every_worker_gets_what_its_norm_needs(workers, size, norm):
    least_share = size // workers
    possible = least_share >= (2 if norm == "batch" else 1) and (norm != "sync" or size >= 2)
    try:
        JobSpec.model_validate({"steps": 1, "num_workers": workers, "global_batch_size": size, "norm": norm})
    except ValidationError as error:
        assert not possible
        assert error.errors()[0]["loc"] == ("global_batch_size",)
    else:
        assert possible


def test_yaml_numbers_are_those_of_json(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("optimizer: {lr: 1e-3}\nsteps: 10\nname: 1e\n")
    assert read_yaml(path) == {"optimizer": {"lr": 1e-3}, "steps": 10, "name": "1e"}


@pytest.mark.parametrize(("field", "value"), [("padding", 4), ("random_resized_crop", True)])
def test_what_is_cut_at_random_takes_a_size(field, value):
    with pytest.raises(ValidationError, match=f"{field} must have a crop"):
        JobSpec.model_validate({"steps": 1, "data": {"name": "digits", "transform": {field: value}}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, "0.1", True, None])
def test_a_learning_rate_is_a_positive_finite_number(value):
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"steps": 1, "optimizer": {"lr": value}})


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
    ("changes", "field", "takes"),
    [
        ({"num_workers": [4, 2]}, "num_workers", r"must be \[min, max\]"),
        ({"num_workers": [2]}, "num_workers", "at least 2 items"),
        ({"num_workers": 4, "sync_group_size": 3}, "sync_group_size", "must be a divisor of the 4 workers"),
        (
            {"num_workers": [2, 4], "sync_group_size": 2},
            "sync_group_size",
            "must be used with a fixed number of workers",
        ),
        ({"num_workers": 4, "norm": "batch", "sync_group_size": 2}, "sync_group_size", "must be used with norm 'sync'"),
        ({"num_workers": [2, 4], "sharding": "by_label"}, "sharding", "must be used with a fixed number of workers"),
        (
            {"num_workers": [2, 4], "norm": "batch", "global_batch_size": 6},
            "global_batch_size",
            "take 8 to 4000 samples",
        ),
        ({"num_workers": 4, "sync_group_size": 1, "global_batch_size": 6}, "global_batch_size", "take 8 to 4000"),
        ({"global_batch_size": 10, "accumulate": 6}, "accumulate", "6 parts of 10 samples leave 1"),
        ({"early_stop": {"metric": "f1"}}, "early_stop", "'f1' is not among evaluation.metrics"),
        ({"checkpoint": {"keep_best": "auroc"}}, "checkpoint", "'auroc' is not among evaluation.metrics"),
        ({"evaluation": {"metrics": ["f1", "f1"]}}, "evaluation.metrics", "must name each metric once"),
        (
            {"model": {"name": "torchvision:resnet18", "arguments": {"weights": "DEFAULT"}}},
            "model.arguments",
            "weights",
        ),
        ({"model": {"name": "timm:resnet26", "arguments": {"checkpoint_path": "/x"}}}, "model.arguments", "untrained"),
        ({"model": {"name": "torchvision:../x"}}, "model.name", "pattern"),
        ({"model": {"name": "import:os"}}, "model.name", "pattern"),
        ({"data": {"name": "imagefolder", "root": "/x", "train_folder": "../y"}}, "data.train_folder", "pattern"),
        ({"data": {"name": "imagefolder", "root": "/x", "train_folder": ".."}}, "data.train_folder", "pattern"),
        ({"data": {"name": "imagefolder", "root": "/x", "test_folder": "."}}, "data.test_folder", "pattern"),
        ({"deadline_seconds": 0}, "deadline_seconds", "greater than 0"),
        (sgd(nesterov=True), "optimizer.arguments", "nesterov must have a momentum above 0"),
        (sgd(nesterov=True, momentum=0.9, dampening=0.1), "optimizer.arguments", "no dampening"),
        (sgd(fused=True, foreach=True), "optimizer.arguments", "fused must be false together with foreach"),
        ({"data": {"name": "digits", "transform": {"mean": [0.1] * 3}}}, "data.transform", "each of 1 channels"),
        (
            {"data": {"name": "mnist5k", "transform": {"channels": 3, "std": [1.0, 1.0]}}},
            "data.transform",
            "of 3 channels",
        ),
        ({"data": FOLDER | {"transform": {"std": [1.0, 2.0]}}}, "data.transform", "each of 3 channels"),
        ({"data": STREAM | {"shape": [1, 8, 8], "transform": {"mean": [0.1] * 3}}}, "data.transform", "of 1 channels"),
        ({"data": STREAM | {"classes": 5}, "evaluation": TOP5}, "evaluation", "more than 5 classes .got 5"),
        ({"data": synthetic(classes=3), "evaluation": TOP5}, "evaluation", "more than 5 classes .got 3"),
        ({"model": cnn(5), "data": {"name": "digits"}}, "data", "8x8 must have at most 4 levels .* .got 5"),
        ({"model": cnn(2), "data": synthetic(shape=[12])}, "data", "must be images for model 'cnn'"),
        ({"activation_checkpointing": True}, "activation_checkpointing", "must be false for model 'mlp'"),
        (
            {"model": cnn(1), "activation_checkpointing": True},
            "activation_checkpointing",
            "must be false for model 'cnn'",
        ),
        ({"probes": {"layers": ["norm4"]}}, "probes", "layers must be among flatten, linear1.* .got norm4"),
        ({"model": cnn(2), "probes": {"layers": ["pool2"]}}, "probes", "layers must be among conv1.* .got pool2"),
        ({"optimizer": {"name": "torch:Adafactor"}, "parallel": "fsdp"}, "parallel", "must be 'ddp' for optimizer"),
        (sgd(fused=True) | {"parallel": "fsdp"}, "parallel", "'torch:SGD' with fused"),
        ({"early_stop": {"target": 95}}, "early_stop.target", "a share above 0 and at most 1 .got 95"),
        ({"early_stop": {"target": 0}}, "early_stop.target", "a share above 0 and at most 1 .got 0"),
        ({"early_stop": {"metric": "test_loss", "target": 0}}, "early_stop.target", "above 0 .got 0"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, field, takes):
    content = {"steps": 1} | changes
    with pytest.raises(ValidationError, match=takes) as error:
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
        {"data": {"name": "digits", "transform": {"resize": 32, "channels": 3}}, "model": {"name": "timm:resnet26"}},
    ],
)
def test_what_fits_survives_being_written_and_read(changes):
    spec = JobSpec.model_validate({"steps": 1} | changes)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.min_workers <= spec.max_workers


def bomb(levels, width):
    """YAML of a few hundred bytes that stands for width ** levels values."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * width) + "]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(9, 9), "it has more than 20 aliases"),
        ("a: &a {k: 1}\nb: {<<: [" + ", ".join(["*a"] * 30) + "]}", "it has more than 20 aliases"),
        ("[" * 3_000 + "]" * 3_000, "nested too deeply"),
        ("{a: " * 3_000 + "1" + "}" * 3_000, "nested too deeply"),
        ("x: " + "y" * 1_000_001, "must have at most 1,000,000 bytes"),
    ],
)
def test_a_file_that_would_take_too_much_is_refused(tmp_path, text, reason):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ValueError, match=reason) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2001-99-99", "must be a valid timestamp .got '2001-99-99'."),
        ("2001-01-01 00:00:00 +99:00", "must be a valid timestamp"),
        ("!!timestamp x", "must be a valid timestamp .got 'x'."),
        ("0b_", "must be a valid int .got '0b_'."),
        ("!!int x", "must be a valid int .got 'x'."),
        ('!!int ""', "must be a valid int .got ''."),
        ("9" * 5_000, f"must be a valid int .got '{'9' * 50}'."),
        ("0x" + "f" * 5_000, "must be a valid int"),
        ("!!bool x", "must be a valid bool .got 'x'."),
        ("!!float x", "must be a valid float .got 'x'."),
        ("1" + ":00" * 300 + ".5", "must be a valid float"),
    ],
)
def test_a_value_that_does_not_fit_its_tag_is_named_with_its_place(tmp_path, value, reason):
    path = tmp_path / "spec.yaml"
    path.write_text(f"steps: 1\na: [{value}]\n")
    with pytest.raises(ValueError, match=f"(?s)spec.yaml holds no YAML: value: {reason}.*line 2, column 5"):
        read_yaml(path)


def test_some_aliases_are_taken(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("base: &base {steps: 1}\nother: {<<: *base, seed: 2}")
    assert read_yaml(path)["other"] == {"steps": 1, "seed": 2}


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"schedule": {"name": "constant", "warmup_steps": 99}}, []),
        (
            {"schedule": {"name": "constant", "warmup_steps": 100}},
            [r"schedule.warmup_steps: .* within 100 steps \(got 100\)"],
        ),
        ({"schedule": {"name": "step", "steps": [50, 99]}}, []),
        ({"schedule": {"name": "step", "steps": [50, 99], "warmup_steps": 1}}, [r"schedule.steps: 99 come after"]),
        (
            {"schedule": {"name": "step", "steps": [50, 100, 200]}},
            [r"schedule.steps: 100, 200 come after .* 100 steps"],
        ),
        ({"num_workers": 1, "parallel": "fsdp"}, ["parallel: has no effect on one worker"]),
        ({"num_workers": [1, 2], "parallel": "fsdp"}, []),
        (
            {"accumulate": 2},
            [r"accumulate: under norm 'sync' the statistics are of each part of 30 samples.*\(got 2\)"],
        ),
        ({"accumulate": 2, "norm": "batch"}, ["accumulate: under norm 'batch'"]),
        ({"accumulate": 2, "norm": "group"}, []),
        ({"evaluation": {"statistics": "batch"}}, ["evaluation.statistics: the exported model holds moving averages"]),
        (
            {"early_stop": {"metric": "test_loss", "mode": "max"}},
            ["early_stop.mode: the smallest test_loss is the best"],
        ),
        ({"early_stop": {"metric": "test_loss", "mode": "min"}}, []),
        ({"checkpoint": {"keep_best": "accuracy", "best_mode": "min"}}, ["checkpoint.best_mode: the largest accuracy"]),
        ({"on_extend": "restart"}, ["on_extend: has no effect on a constant schedule"]),
        ({"on_extend": "restart", "schedule": {"name": "cosine"}}, []),
    ],
)
def test_what_has_no_effect_is_warned_of(changes, warnings):
    found = spec_warnings(JobSpec.model_validate({"steps": 100} | changes))
    assert len(found) == len(warnings)
    for text, pattern in zip(found, warnings, strict=True):
        assert re.match(pattern, text), text
