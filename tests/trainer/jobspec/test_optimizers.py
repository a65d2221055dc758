import pytest
from pydantic import ValidationError

from tests.trainer.training.schedules import schedule
from trainer.jobspec import (
    JobSpec,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, "0.1", True, None])
def test_a_learning_rate_is_a_positive_finite_number(value):
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"steps": 1, "optimizer": {"lr": value}})


def test_milestones_of_a_schedule_ascend():
    with pytest.raises(ValidationError, match="must be ascending steps"):
        schedule(name="step", steps=[20, 10])


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValidationError, match="'constant', 'step', 'exponential', 'cosine'"):
        JobSpec.model_validate({"steps": 1, "lr_schedule": {"name": "linear"}})
