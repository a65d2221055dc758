"""Specs of evaluation, early stopping and checkpoints."""

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainer.jobspec.base import FrozenModel
from trainer.jobspec.metrics import Direction, Measured, Metric, metric_direction


class EvaluationSpec(FrozenModel):
    """How the test data is measured."""

    metrics: Annotated[list[Metric], Field(min_length=1)] = Field(
        ["accuracy"], description="metrics of torchmetrics over all test samples; `test_loss` is always there"
    )
    statistics: Literal["moving", "precise", "batch"] = Field(
        "moving",
        description="what batch normalisation takes for mean and variance: moving averages; means over training batches "
        "(Ioffe & Szegedy 2015, Algorithm 2); or those of the test batch itself",
    )
    precise_batches: int = Field(
        50, ge=1, le=100_000, description="training batches that `precise` takes its means over"
    )
    batch_size: int = Field(1_000, ge=1, le=1_000_000, description="test samples at a time, over all workers")

    @field_validator("metrics")
    @classmethod
    def _once(cls, metrics: list[Metric]) -> list[Metric]:
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"must name each metric once (got {metrics})")
        return metrics


class EarlyStopSpec(FrozenModel):
    """When to stop before the last step."""

    metric: Measured = "accuracy"
    mode: Direction | None = Field(None, description="which values are better; null: the metric's own direction")
    patience: int = Field(5, ge=1, le=100_000, description="evaluations without improvement before the run ends")
    min_delta: float = Field(0.0, ge=0, description="what counts as an improvement")
    target: float | None = Field(None, description="value at which the run ends at once")

    @field_validator("target")
    @classmethod
    def _can_be_reached(cls, target: float | None, info: ValidationInfo) -> float | None:
        """Refuse a target that every evaluation reaches, or none."""
        is_loss = info.data.get("metric") == "test_loss"
        if target is not None and not 0 < target <= (math.inf if is_loss else 1):
            raise ValueError(f"must be {'above 0' if is_loss else 'a share above 0 and at most 1'} (got {target:g})")
        return target

    @property
    def direction(self) -> Direction:
        """Which values of the metric are better."""
        return self.mode or metric_direction(self.metric)


class CheckpointSpec(FrozenModel):
    """What a later attempt goes on from."""

    every: int | None = Field(
        None, ge=1, le=100_000_000, description="steps between checkpoints; null: about one a minute, by the clock"
    )
    keep_last: int = Field(2, ge=1, le=1_000, description="newest checkpoints that are kept")
    keep_best: Measured | None = Field(None, description="metric whose best checkpoint is kept too")
    best_mode: Direction | None = Field(None, description="which values are better; null: the metric's own direction")
    export: Literal["best", "last"] = Field(
        "best", description="which model is exported as `model`, if `keep_best` is set; the other one is exported too"
    )
    address: str | None = Field(
        None, max_length=4_096, description="folder or fsspec address under an allowed root; null: the job's own folder"
    )

    @property
    def best_direction(self) -> Direction:
        """Which values of `keep_best` are better."""
        return self.best_mode or metric_direction(self.keep_best or "")
