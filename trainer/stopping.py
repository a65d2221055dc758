"""What follows from an evaluation: whether the run has seen enough, and whether it is the best so far."""

from trainer.spec import CheckpointSpec, EarlyStopSpec
from trainer.state import Position


def take_note(spec: EarlyStopSpec | None, position: Position) -> None:
    """Count the newest evaluation in."""
    if spec is None:
        return
    value = position.metrics[spec.metric]
    gain = value - position.best if position.best is not None else None
    if gain is None or (gain if spec.mode == "max" else -gain) > spec.min_delta:
        position.best, position.stale = value, 0
    else:
        position.stale += 1


def is_enough(spec: EarlyStopSpec | None, position: Position) -> bool:
    """Whether to end the run now: the target is reached, or patience is at its end."""
    if spec is None or position.best is None:
        return False
    is_there = spec.target is not None and (
        position.best >= spec.target if spec.mode == "max" else position.best <= spec.target
    )
    return is_there or position.stale >= spec.patience


def is_new_best(spec: CheckpointSpec, position: Position) -> bool:
    """Whether the newest evaluation is the best by `keep_best`, so that its step is to be saved; take note of it."""
    if spec.keep_best is None:
        return False
    value, best = position.metrics[spec.keep_best], position.best_kept
    if best is None or (value > best if spec.best_mode == "max" else value < best):
        position.best_kept = value
        return True
    return False
