from dataclasses import replace

import pytest
from pydantic import ValidationError

from service.domain.errors import Conflict
from service.domain.jobs import JobState
from service.domain.submission import SubmitOptions, clone, options_of, resume
from tests.service.examples import make_job
from trainer.jobspec import InvalidField, JobSpec

OPTIONS = SubmitOptions(priority=3, tags=["a"], queue_timeout_seconds=5.0, max_run_seconds=7.0)


@pytest.mark.parametrize("variable", ["PATH", "LD_PRELOAD", "PYTHONPATH", "RAY_ADDRESS", "SYNCBN_TOKEN"])
def test_variables_that_change_programs_are_rejected(variable):
    with pytest.raises(ValidationError, match="must not be PATH"):
        SubmitOptions(secrets={variable: "x"})


def test_duplicate_tags_are_rejected():
    with pytest.raises(ValidationError, match="each tag once"):
        SubmitOptions(tags=["a", "a"])


def test_a_clone_has_the_options_of_its_source_and_starts_from_step_0():
    job = OPTIONS.job(owner="ann", name="one", spec=JobSpec(steps=10, num_workers=1), secrets={})
    made = clone(
        replace(job, state=JobState.FAILED, attempt=3),
        owner="bob",
        name=None,
        overrides={"steps": 20},
        secrets={},
    )
    assert options_of(made) == OPTIONS
    assert (made.owner, made.name, made.cloned_from, made.attempt) == ("bob", "one", job.id, 1)
    assert (made.state, made.spec.steps) == (JobState.QUEUED, 20)


def resumed(job, **overrides):
    return resume(job, owner="ann", name=None, overrides=overrides, secrets={})


def test_only_ended_jobs_are_resumed_and_only_with_compatible_changes():
    job = make_job()
    with pytest.raises(Conflict, match="only jobs that are paused or have ended"):
        resumed(job)
    failed = replace(job, state=JobState.FAILED)
    assert resumed(failed).resumed_from == job.id
    with pytest.raises(InvalidField, match=r"overrides\.norm"):
        resumed(failed, norm="batch")
    with pytest.raises(Conflict, match="has done all its steps"):
        resumed(replace(job, state=JobState.SUCCEEDED))


def test_extending_a_cosine_schedule_needs_an_explicit_choice():
    spec = JobSpec.model_validate({"steps": 10, "num_workers": 1, "lr_schedule": {"name": "cosine"}})
    job = make_job(spec=spec, state=JobState.SUCCEEDED)
    with pytest.raises(InvalidField, match=r"overrides\.on_extend"):
        resumed(job, steps=20)
    assert resumed(job, steps=20, on_extend="restart").spec.steps == 20
