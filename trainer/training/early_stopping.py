"""Early stopping and detection of the best evaluation."""

from trainer.checkpoint.state import TrainProgress
from trainer.jobspec import CheckpointSpec, EarlyStopSpec, improvement, is_reached


def update(spec: EarlyStopSpec | None, position: TrainProgress) -> None:
    """Update the early stopping state with the newest evaluation."""
    if spec is None:
        return
    criterion, value = f"{spec.direction} {spec.metric}", position.metrics[spec.metric]
    best = position.best.get(criterion)
    if best is None or improvement(value, best, spec.direction) > spec.min_delta:
        position.best, position.evals_since_best = {criterion: value}, 0
    else:
        position.evals_since_best += 1


def should_stop(spec: EarlyStopSpec | None, position: TrainProgress) -> bool:
    """Return whether to end the run: target reached or patience exhausted."""
    if spec is None or f"{spec.direction} {spec.metric}" not in position.best:
        return False
    value = position.metrics[spec.metric]
    if spec.target is not None and is_reached(value, spec.target, spec.direction):
        return True
    return position.evals_since_best >= spec.patience


def update_best(spec: CheckpointSpec, position: TrainProgress) -> bool:
    """Record the newest evaluation if it is the best by `keep_best`.

    Returns whether it is, so that a checkpoint of its step has to be saved.
    """
    if spec.keep_best is None or position.step == 0:  # an untrained model is not saved
        return False
    criterion, value = f"{spec.best_direction} {spec.keep_best}", position.metrics[spec.keep_best]
    best = position.best_kept.get(criterion)
    if best is None or improvement(value, best, spec.best_direction) > 0:
        position.best_kept = {criterion: value}
        return True
    return False
