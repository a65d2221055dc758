import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.spec import JobSpec, field_path, read_yaml


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
    with pytest.raises(ValidationError, match=f"{field} takes a crop"):
        JobSpec.model_validate({"steps": 1, "data": {"name": "digits", "transform": {field: value}}})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, "0.1", True, None])
def test_a_learning_rate_is_a_positive_finite_number(value):
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"steps": 1, "optimizer": {"lr": value}})


@pytest.mark.parametrize(
    ("changes", "field", "takes"),
    [
        ({"num_workers": [4, 2]}, "num_workers", r"takes \[least, most\]"),
        ({"num_workers": [2]}, "num_workers", "at least 2 items"),
        ({"num_workers": 4, "sync_group_size": 3}, "sync_group_size", "takes a divisor of the 4 workers"),
        ({"num_workers": [2, 4], "sync_group_size": 2}, "sync_group_size", "takes a fixed number of workers"),
        ({"num_workers": 4, "norm": "batch", "sync_group_size": 2}, "sync_group_size", "takes norm 'sync'"),
        ({"num_workers": [2, 4], "sharding": "by_label"}, "sharding", "takes a fixed number of workers"),
        (
            {"num_workers": [2, 4], "norm": "batch", "global_batch_size": 6},
            "global_batch_size",
            "take 8 to 4000 samples",
        ),
        ({"num_workers": 4, "sync_group_size": 1, "global_batch_size": 6}, "global_batch_size", "take 8 to 4000"),
        ({"global_batch_size": 10, "accumulate": 6}, "accumulate", "6 parts of 10 samples leave 1"),
        ({"early_stop": {"metric": "f1"}}, "early_stop", "'f1' is not among evaluation.metrics"),
        ({"checkpoint": {"keep_best": "auroc"}}, "checkpoint", "'auroc' is not among evaluation.metrics"),
        ({"evaluation": {"metrics": ["f1", "f1"]}}, "evaluation.metrics", "takes each metric once"),
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


def test_some_aliases_are_taken(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("base: &base {steps: 1}\nother: {<<: *base, seed: 2}")
    assert read_yaml(path)["other"] == {"steps": 1, "seed": 2}
