import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.spec import JobSpec, read_yaml


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
