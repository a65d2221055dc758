import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.jobspec import CnnSpec, MlpSpec, ModelSpec

MODELS = TypeAdapter(ModelSpec)


def test_the_paths_of_a_network_are_in_forward_order():
    assert MlpSpec(hidden=[4], dropout=0.1).module_paths == [
        "flatten",
        "linear1",
        "norm1",
        "activation1",
        "dropout1",
        "output",
    ]
    assert CnnSpec(channels=[4]).module_paths[-1] == "output"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "resnet"}, "torchvision:<name>"),
        ({"name": "timm:resnet18", "arguments": {"pretrained": True}}, "must not contain pretrained"),
        ({"name": "timm:resnet18", "arguments": {"num_classes": 3}}, "must not contain num_classes"),
        ({"name": "mlp", "hidden": []}, "at least 1 item"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(content, message):
    with pytest.raises(ValidationError, match=message):
        MODELS.validate_python(content)
