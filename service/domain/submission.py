"""Options of a submission besides its spec: priority, limits, retries, tags."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, field_validator

from service.domain.comparisons import override
from service.domain.errors import Conflict
from service.domain.jobs import Job, JobState, new_id
from service.domain.retries import Retries
from trainer.jobspec import RESUME_KEY_FIELDS, FrozenModel, InvalidField, JobSpec, depends_on_steps

Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:=/-]*$", max_length=80)]


Variable = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        max_length=100,
    ),
]
SecretName = Annotated[
    str, Field(pattern=r"^([a-z0-9][a-z0-9._-]{0,79}/)?[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
]
RESERVED_VARIABLES = re.compile(r"PATH|(LD_|PYTHON|RAY_|SYNCBN_).*")
"""Variables that change which programs are found and loaded, or the settings of Python, Ray and this project.
"""


class SubmitOptions(FrozenModel):
    """Priority, limits, retries, tags and secrets of a submission.

    They are the same for all jobs of a comparison.
    """

    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="jobs of a higher one go first; equal ones by their owners' shares, then by age",
    )
    preemptible: bool = Field(
        False,
        description="whether a job of a higher priority may take its resources while it runs: it saves a "
        "checkpoint, returns to the queue and continues from there",
    )
    tags: Annotated[list[Tag], Field(max_length=20)] = Field([], description="words to find the job by")
    retries: Retries = Retries()
    secrets: Annotated[dict[Variable, SecretName], Field(max_length=20)] = Field(
        {},
        description="environment variables of the workers, to the names of secrets that the operator keeps "
        "for the owner, "
        'such as `{"HF_TOKEN": "hf-token"}`; `shared/<name>` is one that all may use',
    )
    queue_timeout_seconds: float | None = Field(
        None, gt=0, le=31_536_000, description="how long to wait for the first attempt before the job fails"
    )
    max_run_seconds: float | None = Field(
        None,
        gt=0,
        le=31_536_000,
        description="how long all attempts together may run before the job is stopped and fails",
    )

    @field_validator("tags")
    @classmethod
    def _once(cls, tags: list[str]) -> list[str]:
        # Tags are rows with a unique key, so a duplicate would fail later, as an internal error.
        if len(set(tags)) < len(tags):
            raise ValueError(f"must have each tag once (got {tags})")
        return tags

    @field_validator("secrets")
    @classmethod
    def _has_no_reserved_variable(cls, secrets: dict[str, str]) -> dict[str, str]:
        for variable in secrets:
            if RESERVED_VARIABLES.fullmatch(variable):
                raise ValueError(
                    f"must not be PATH or begin with LD_, PYTHON, RAY_ or SYNCBN_ (got {variable})"
                )
        return secrets

    def job(self, *, owner: str, name: str, spec: JobSpec, secrets: dict[str, str], **more: Any) -> Job:
        """Return a new job with these options; `secrets` are full references."""
        now = datetime.now(UTC)
        return Job(
            id=new_id("job"),
            name=name,
            owner=owner,
            spec=spec,
            tags=tuple(self.tags),
            priority=self.priority,
            preemptible=self.preemptible,
            retries=self.retries,
            secrets=secrets,
            queue_timeout_seconds=self.queue_timeout_seconds,
            max_run_seconds=self.max_run_seconds,
            reason="submitted by the user",
            created_at=now,
            queued_at=now,
            **more,
        )


def options_of(job: Job) -> SubmitOptions:
    """Return the options with which a job was submitted."""
    return SubmitOptions(
        **{name: getattr(job, name) for name in SubmitOptions.model_fields if name != "tags"},
        tags=list(job.tags),
    )


def clone(
    job: Job, *, owner: str, name: str | None, overrides: Mapping[str, Any], secrets: dict[str, str]
) -> Job:
    """Return a new job with the spec of another one and `overrides`.

    Raises InvalidField.
    """
    spec = override(job.spec, overrides)
    return options_of(job).job(
        owner=owner, name=name or job.name, spec=spec, secrets=secrets, cloned_from=job.id
    )


def resume(
    job: Job, *, owner: str, name: str | None, overrides: Mapping[str, Any], secrets: dict[str, str]
) -> Job:
    """Return a new job that continues from the checkpoints of an ended one.

    Raises Conflict if it has not ended, or has nothing left to do; InvalidField for what cannot change in
    between, and for another number of steps under a schedule that depends on it, without a choice.
    """
    if not job.state.is_terminal:
        raise Conflict(
            f"job {job.id} is {job.state.value}; only jobs that are paused or have ended can be resumed"
        )
    for path, value in overrides.items():
        if (
            path == "checkpoint.address"
            or path == "checkpoint"
            or path.partition(".")[0] in RESUME_KEY_FIELDS
        ):
            fields = ", ".join(RESUME_KEY_FIELDS)
            rule = (
                f"must be a field that a checkpoint does not depend on: any but {fields} and "
                "checkpoint.address"
            )
            raise InvalidField(f"overrides.{path}", value, rule)
    # A failed or cancelled job has steps left, but a succeeded one only has them after a change.
    if job.state == JobState.SUCCEEDED and not overrides:
        raise Conflict(
            f"job {job.id} has done all its steps; overrides, such as more `steps`, would give it "
            "something to do"
        )
    spec = override(job.spec, overrides)
    # The rates after the last step depend on what the user wants; a default could silently be wrong.
    if depends_on_steps(spec.lr_schedule) and spec.steps != job.spec.steps and spec.on_extend is None:
        rule = (
            f"must be continue, restart or rescale: the {spec.lr_schedule.name} schedule ran over "
            f"{job.spec.steps} steps"
        )
        raise InvalidField("overrides.on_extend", None, rule)
    return options_of(job).job(
        owner=owner, name=name or job.name, spec=spec, secrets=secrets, resumed_from=job.id
    )
