import pytest

from tests.trainer.factories import make_spec
from trainer.check import check
from trainer.errors import ConfigurationError


def test_the_size_of_a_library_model_is_measured_without_its_weights():
    size = check(make_spec(model={"name": "torchvision:resnet18"}))
    assert size.parameters == 11_175_370  # of 1 channel and 10 classes


def test_models_of_this_project_have_no_size_to_measure():
    assert check(make_spec()) is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": {"name": "torchvision:resnet1"}}, "model.name"),
        ({"model": {"name": "torchvision:resnet18", "arguments": {"x": 1}}}, "model.arguments"),
        ({"model": {"name": "import:no_such_module:build"}}, "model.name"),
    ],
)
def test_unknown_names_are_rejected(changes, field):
    with pytest.raises(ConfigurationError) as error:
        check(make_spec(**changes))
    assert error.value.field == field
