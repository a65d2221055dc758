"""Learning rate schedules for tests."""

from pydantic import TypeAdapter

from trainer.jobspec import (
    ScheduleSpec,
)


def schedule(**content):
    return TypeAdapter(ScheduleSpec).validate_python(content)
