import pytest
from pydantic import ValidationError

from trainer.jobspec import JobSpec


@pytest.mark.parametrize(("field", "value"), [("padding", 4), ("random_resized_crop", True)])
def test_random_crops_need_a_size(field, value):
    with pytest.raises(ValidationError, match=f"{field} must have a crop"):
        JobSpec.model_validate({"steps": 1, "data": {"name": "digits", "transform": {field: value}}})
