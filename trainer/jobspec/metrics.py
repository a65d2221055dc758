"""Names and directions of metrics."""

from collections.abc import Iterable
from typing import Literal

Metric = Literal[
    "accuracy",
    "top5_accuracy",
    "balanced_accuracy",
    "f1",
    "precision",
    "recall",
    "auroc",
    "calibration_error",
]
Measured = Metric | Literal["test_loss"]
"""Metric that an evaluation yields: those in `evaluation.metrics`, and `test_loss` always."""
TRAIN_SECONDS = "train_seconds"
"""Metric with the seconds of training and evaluation so far, in all attempts; logged at each evaluation."""
Direction = Literal["max", "min"]
"""Whether larger or smaller values of a metric are better."""

DIRECTIONS: dict[str, Direction] = {
    "accuracy": "max",
    "top5_accuracy": "max",
    "balanced_accuracy": "max",
    "f1": "max",
    "precision": "max",
    "recall": "max",
    "auroc": "max",
    "calibration_error": "min",
    "test_loss": "min",
    "train_loss": "min",
}
"""Direction of each metric; a test compares them with torchmetrics."""


def metric_direction(name: str) -> Direction:
    """Return the direction of a metric.

    Values without one, such as the learning rate and probes, count as "max".
    """
    return DIRECTIONS.get(name, "max")


def best_value(values: Iterable[float], direction: Direction) -> float:
    """Return the best of one or more values."""
    return max(values) if direction == "max" else min(values)


def is_reached(value: float, target: float, direction: Direction) -> bool:
    """Return whether a value is equal to or better than `target`."""
    return value >= target if direction == "max" else value <= target


def improvement(value: float, best: float, direction: Direction) -> float:
    """Return the improvement of a value over `best`; negative if it is worse."""
    return value - best if direction == "max" else best - value
