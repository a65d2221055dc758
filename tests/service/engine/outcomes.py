"""Outcomes for tests."""

from trainer.jobspec import Outcome

SUCCEEDED = Outcome(state="succeeded", reason="finished 10 steps")
