"""Specs of probes."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from trainer.jobspec.base import FrozenModel

Probe = Literal["percentiles", "drift", "discrepancy", "variance_share", "gradient_norm", "landscape", "shift"]


class ProbesSpec(FrozenModel):
    """Measurements of layers and of the loss around a step; docs/probes.md states what each one is and costs."""

    measure: list[Probe] = Field(
        [],
        description="percentiles (15, 50, 85) of pre-activations; drift of their mean and variance; discrepancy between workers; "
        "variance_share between workers; gradient_norm; landscape: loss range and gradient change along the step; shift: of "
        "gradients by the layers below",
    )
    every: int = Field(100, ge=1, le=100_000_000, description="steps between measurements")
    layers: Annotated[list[str], Field(max_length=1_000)] = Field(
        [],
        description="paths of modules whose outputs are measured, and for gradient_norm and shift the weights within; none: the "
        "inputs of all activations, for discrepancy and variance_share of all norms, and all weights",
    )

    @field_validator("measure")
    @classmethod
    def _once(cls, measure: list[Probe]) -> list[Probe]:
        if len(set(measure)) < len(measure):
            raise ValueError(f"must name each measurement once (got {measure})")
        return measure
