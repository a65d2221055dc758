"""Names and directions of metrics."""

from collections.abc import Iterable
from typing import Literal

Metric = Literal[
    "accuracy", "top5_accuracy", "balanced_accuracy", "f1", "precision", "recall", "auroc", "calibration_error"
]
Measured = Metric | Literal["test_loss"]
"""What every evaluation yields, if it is among the metrics asked for."""
Direction = Literal["max", "min"]
"""Whether the largest or the smallest value of a metric is the best."""

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
"""A test compares this with torchmetrics."""


def metric_direction(name: str) -> Direction:
    """Return the direction of a metric; "max" for what has none, such as the learning rate and probes."""
    return DIRECTIONS.get(name, "max")


def best_value(values: Iterable[float], direction: Direction) -> float:
    """Return the best of one or more values."""
    return max(values) if direction == "max" else min(values)


def is_reached(value: float, target: float, direction: Direction) -> bool:
    """Whether a value is `target` or better."""
    return value >= target if direction == "max" else value <= target


def improvement(value: float, best: float, direction: Direction) -> float:
    """Return by how much a value is better than `best`; negative if it is worse."""
    return value - best if direction == "max" else best - value
