import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.jobspec.base import MAX_ARGUMENT_DEPTH, MAX_ARGUMENT_VALUES, Arguments, kind_of

ARGUMENTS = TypeAdapter(Arguments)


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return {"x": value}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": "a\0b"}, "without NUL characters"),
        ({"x": ["\ud800"]}, "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        (nested(MAX_ARGUMENT_DEPTH), "at most 32 levels"),
        ({"x": [0] * MAX_ARGUMENT_VALUES}, "at most 10,000 values"),
    ],
)
def test_arguments_that_cannot_be_stored_are_refused(arguments, message):
    with pytest.raises(ValidationError, match=message):
        ARGUMENTS.validate_python(arguments)


def test_arguments_within_the_limits_are_kept():
    for arguments in ({}, nested(MAX_ARGUMENT_DEPTH - 1), {"x": [0] * (MAX_ARGUMENT_VALUES - 9)}):
        assert ARGUMENTS.validate_python(arguments) == arguments


def test_the_kind_is_the_prefix_before_a_colon():
    assert kind_of({"name": "timm:resnet18"}) == "timm"
    assert kind_of({}, "mlp") == "mlp"
    assert kind_of(3) is None
