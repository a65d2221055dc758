"""Specifications of evaluation, early stopping, checkpoints and probes."""

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from trainer.jobspec.base import FrozenModel
from trainer.jobspec.metrics import Direction, Measured, Metric, metric_direction


class EvaluationSpec(FrozenModel):
    """Evaluation on the test data."""

    metrics: Annotated[list[Metric], Field(min_length=1)] = Field(
        ["accuracy"], description="metrics of torchmetrics over all test samples, in addition to `test_loss`"
    )
    statistics: Literal["moving", "precise", "batch"] = Field(
        "moving",
        description="source of mean and variance of batch normalisation: moving averages; means over "
        "training batches (Ioffe & Szegedy 2015, Algorithm 2); or the test batch itself",
    )
    precise_batches: int = Field(50, ge=1, le=100_000, description="number of training batches for `precise`")
    batch_size: int = Field(1_000, ge=1, le=1_000_000, description="test samples per batch, over all workers")

    @field_validator("metrics")
    @classmethod
    def _once(cls, metrics: list[Metric]) -> list[Metric]:
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"must name each metric once (got {metrics})")
        return metrics


class EarlyStopSpec(FrozenModel):
    """Criteria for ending a run before its last step."""

    metric: Measured = "accuracy"
    mode: Direction | None = Field(
        None, description="whether larger or smaller values are better; null: the metric's default"
    )
    patience: int = Field(
        5, ge=1, le=100_000, description="evaluations without improvement after which the run ends"
    )
    min_delta: float = Field(0.0, ge=0, description="smallest improvement that counts")
    target: float | None = Field(None, description="value at which the run ends immediately")

    @field_validator("target")
    @classmethod
    def _can_be_reached(cls, target: float | None, info: ValidationInfo) -> float | None:
        """Reject a target that every evaluation reaches, or that none can reach."""
        # All metrics but the loss are shares in [0, 1].
        is_loss = info.data.get("metric") == "test_loss"
        if target is not None and not 0 < target <= (math.inf if is_loss else 1):
            raise ValueError(
                f"must be {'above 0' if is_loss else 'a share above 0 and at most 1'} (got {target:g})"
            )
        return target

    @property
    def direction(self) -> Direction:
        """Direction in which the metric improves."""
        return self.mode or metric_direction(self.metric)


class CheckpointSpec(FrozenModel):
    """Checkpoints from which later attempts resume."""

    every: int | None = Field(
        None,
        ge=1,
        le=100_000_000,
        description="steps between checkpoints; null: about one per minute",
    )
    keep_last: int = Field(2, ge=1, le=1_000, description="number of newest checkpoints to keep")
    keep_best: Measured | None = Field(None, description="metric whose best checkpoint is also kept")
    best_mode: Direction | None = Field(
        None, description="whether larger or smaller values are better; null: the metric's default"
    )
    export: Literal["best", "last"] = Field(
        "best",
        description="checkpoint exported as `model` if `keep_best` is set; the other one is exported as well",
    )
    address: str | None = Field(
        None,
        max_length=4_096,
        description="folder or fsspec address below an allowed root; null: the job's folder",
    )

    @property
    def best_direction(self) -> Direction:
        """Direction in which `keep_best` improves."""
        return self.best_mode or metric_direction(self.keep_best or "")


Probe = Literal[
    "percentiles",
    "drift",
    "discrepancy",
    "variance_share",
    "sync_cost",
    "gradient_norm",
    "landscape",
    "shift",
]


class ProbesSpec(FrozenModel):
    """Measurements of layers, and of the loss around a step.

    docs/probes.md has their definitions and costs.
    """

    measure: list[Probe] = Field(
        [],
        description="percentiles: 15, 50 and 85 of pre-activations; drift: of their mean and variance; "
        "discrepancy: between workers; variance_share: between workers; sync_cost: time of synchronisation "
        "in a step; gradient_norm; landscape: loss range and gradient change along the step; shift: of "
        "gradients by the layers below",
    )
    every: int = Field(100, ge=1, le=100_000_000, description="steps between measurements")
    layers: Annotated[list[str], Field(max_length=1_000)] = Field(
        [],
        description="paths of modules whose outputs (gradient_norm, shift: weights) are measured; "
        "empty: the inputs of all activations (discrepancy, variance_share, sync_cost: of all norms), "
        "and all weights",
    )

    @field_validator("measure")
    @classmethod
    def _once(cls, measure: list[Probe]) -> list[Probe]:
        if len(set(measure)) < len(measure):
            raise ValueError(f"must name each measurement once (got {measure})")
        return measure
