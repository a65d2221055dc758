"""Transitions for tests."""

from service.domain.jobs import JobState, Transition


def to(state, **changes):
    return Transition(state=JobState(state), reason=f"now {state}", **changes)
