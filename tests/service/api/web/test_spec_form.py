import pytest

from service.api.web.spec_form import read_spec, schema_of_spec, sections
from trainer.jobspec import InvalidField, JobSpec


def fields(spec):
    return {field.path: field for each in sections(spec).values() for field in each}


def test_every_field_of_a_spec_has_a_field_in_the_form():
    paths = {path.partition(".")[0] for path in fields({})}
    assert paths == set(schema_of_spec()["properties"])


def test_defaults_and_choices_come_from_the_schema():
    found = fields({"steps": 5})
    assert (found["steps"].value, found["steps"].default) == ("5", "")
    assert found["norm"].default == "sync"
    assert set(found["norm"].choices) == {"none", "batch", "sync", "group", "layer"}
    assert found["use_gpu"].choices == ("false", "true")
    assert found["model.name"].suggestions == ("mlp", "cnn")
    assert found["model.name"].hint == "or torchvision:…, timm:…, import:…"
    assert found["optimizer.lr"].default == "0.1"


def test_the_kind_of_a_part_decides_on_its_fields():
    assert "model.hidden" in fields({})
    assert "model.channels" in fields({"model": {"name": "cnn"}})
    assert "model.hidden" not in fields({"model": {"name": "cnn"}})
    assert "model.arguments" in fields({"model": {"name": "timm:resnet18"}})
    assert fields({"optimizer": {"name": "adamw"}})["optimizer.lr"].default == "0.001"
    assert "lr_schedule.factor" in fields({"lr_schedule": {"name": "step"}})


@pytest.mark.parametrize(
    "spec",
    [
        {"steps": 5},
        {"steps": 5, "norm": "none", "num_workers": [2, 4], "optimizer": {"lr": 0.001}},
        {"steps": 5, "model": {"name": "cnn", "channels": [4, 8]}, "data": {"name": "digits"}},
        {"steps": 5, "early_stop": {"patience": 3}, "log_model": False},
        {"steps": 5, "data": {"name": "torchvision:MNIST", "root": "/data", "transform": {"flip": True}}},
        {"steps": 5, "lr_schedule": {"name": "step", "steps": [2, 3]}},
    ],
)
def test_what_the_form_shows_is_read_back_as_the_same_spec(spec):
    shown = {field.name: field.value for field in fields(spec).values()}
    assert JobSpec.model_validate(read_spec(shown)) == JobSpec.model_validate(spec)
    assert read_spec(shown) == spec


def test_values_equal_to_the_default_and_those_of_another_kind_are_left_out():
    values = {"spec.norm": "sync", "spec.model.name": "cnn", "spec.model.hidden": "[3]", "spec.steps": " 7 "}
    assert read_spec(values) == {"model": {"name": "cnn"}, "steps": 7}


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(InvalidField, match=r"^spec\.steps: must be a value as in YAML"):
        read_spec({"spec.steps": "["})
