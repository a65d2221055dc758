import pytest
from pydantic import ValidationError

from trainer.jobspec import CheckpointSpec, EarlyStopSpec


def test_the_direction_defaults_to_that_of_the_metric():
    assert EarlyStopSpec(metric="test_loss").direction == "min"
    assert EarlyStopSpec(metric="accuracy").direction == "max"
    assert CheckpointSpec(keep_best="test_loss").best_direction == "min"
    assert CheckpointSpec(keep_best="test_loss", best_mode="max").best_direction == "max"


def test_patience_is_positive():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        EarlyStopSpec(patience=0)
