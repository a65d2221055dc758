import pytest

from trainer.jobspec import field_path

CONTENT = {"spec": {"model": {"name": "mlp", "hidden": [1, 2]}, "steps": 3}, "matrix": {"norm": ["none"]}}


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ((), ""),
        (("spec", "steps"), "spec.steps"),
        (("matrix", "norm", 0), "matrix.norm[0]"),
        (("spec", "model", "mlp", "hidden", 1), "spec.model.hidden[1]"),
        (("spec", "model", "mlp", "missing"), "spec.model.missing"),
        (("spec", "seed"), "spec.seed"),
    ],
)
def test_a_location_is_a_path_without_tags(location, path):
    assert field_path(location, CONTENT) == path
