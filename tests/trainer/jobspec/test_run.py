import json

import pytest
from pydantic import ValidationError

from trainer.driver.history import RunContent
from trainer.failures import Failure
from trainer.jobspec import AttemptTask, Outcome, Progress

CONTEXT = {"job_id": "job-1", "attempt": 2, "name": "x", "folder": "/storage/job-1", "permissions": {}}
FILES = [
    (AttemptTask, {"spec": {"steps": 9}, "context": CONTEXT}),
    (Outcome, {"state": "failed", "reason": "no"}),
    (Progress, {"step": 3, "total_steps": 9, "samples_per_second": 5.0, "eta_seconds": 1.0}),
    (RunContent, {"job_id": "job-1", "tries": [{"attempt": 1, "began_seconds": 1.0}]}),
    (
        Failure,
        {
            "rank": 0, "step": 3, "cause": "hang", "is_consequence": False, "reason": "no", "traceback": "",
            "seconds": 1.0,
        },
    ),
]  # fmt: skip
"""Files between service and trainer, and attempts, with the fields of their first version."""


@pytest.mark.parametrize(("kind", "content"), FILES)
def test_files_of_the_first_version_are_read(kind, content):
    read = kind.model_validate_json(json.dumps(content))
    # A field that was added since needs a default.
    assert kind.model_validate_json(read.model_dump_json()) == read


def with_more(content):
    """Add a field at every level except within a specification."""
    more = {
        name: value if name == "spec" else with_more(value) for name, value in content.items()
    } if isinstance(content, dict) else content  # fmt: skip
    if isinstance(content, list):
        return [with_more(each) for each in content]
    return more | {"of_a_later_version": [1]} if isinstance(more, dict) else more


@pytest.mark.parametrize(("kind", "content"), FILES)
def test_files_of_a_later_version_are_read(kind, content):
    later = json.dumps(with_more(content))
    assert "of_a_later_version" in later
    assert kind.model_validate_json(later) == kind.model_validate_json(json.dumps(content))


def test_a_cause_of_a_later_version_is_unknown():
    read = Outcome.model_validate_json('{"state": "failed", "reason": "no", "cause": "of a later version"}')
    assert read.cause == "unknown"


def test_an_unknown_field_of_a_spec_is_refused():
    """Without it, the run would be another one."""
    task = {"spec": {"steps": 9, "of_a_later_version": 1}, "context": CONTEXT}
    with pytest.raises(ValidationError, match="of_a_later_version"):
        AttemptTask.model_validate_json(json.dumps(task))
