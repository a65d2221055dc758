"""Schemas of advice on synchronised statistics."""

from pydantic import BaseModel, ConfigDict, Field

from service.domain import advice


class LayerAdviceView(BaseModel):
    """Differences between workers at one layer; medians over the measured steps."""

    model_config = ConfigDict(from_attributes=True)

    layer: str = Field(examples=["norm1"])
    values: float | None = Field(examples=[2.0], description="values per channel and worker")
    effective_values: float = Field(
        examples=[2.0],
        description="independent values per channel and worker that would cause the same differences",
    )
    variance_share: float | None = Field(
        examples=[0.43], description="share of the variance that is between workers"
    )
    discrepancy: float | None = Field(
        examples=[0.55],
        description="distance of the workers' means from the mean of the batch, in standard deviations",
    )
    shards_differ: bool = Field(
        examples=[False], description="whether there are fewer effective values than independent samples"
    )
    decision: advice.Decision = Field(examples=["synchronise"])


class SyncCostView(BaseModel):
    """Measured cost of synchronised statistics per step."""

    model_config = ConfigDict(from_attributes=True)

    sync_seconds: float = Field(
        examples=[0.0021], description="time of the collectives of all layers in one step"
    )
    step_seconds: float | None = Field(examples=[0.0112], description="time of a step of this job")
    slowdown: float | None = Field(
        examples=[0.23], description="time of the collectives relative to a step without them"
    )


class AdviceView(BaseModel):
    """Advice on synchronised statistics for one job."""

    model_config = ConfigDict(from_attributes=True)

    decision: advice.Decision = Field(
        examples=["synchronise"],
        description="synchronise: below 8 effective values per channel, or 4 samples, per worker; no need: "
        "from 12 of both; either: between; cannot tell: nothing was measured. The layer with the fewest "
        "decides",
    )
    reason: str = Field(examples=["norm1 has 2 effective values per channel and worker, fewer than 8"])
    basis: advice.Basis = Field(
        examples=["measured"],
        description="predicted: for independent samples, from the batch and the number of workers",
    )
    workers: int = Field(examples=[4])
    sync_group_size: int | None = Field(
        examples=[4],
        description="smallest group of workers whose shared statistics suffice; null: none is needed, or "
        "unknown",
    )
    layers: list[LayerAdviceView]
    cost: SyncCostView | None = Field(description="null: not measured, by the probe `sync_cost`")
