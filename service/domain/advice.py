"""Advice on synchronised statistics: need, size of groups, and cost per step.

A worker that normalises by its own statistics sees a mean that differs from that of the whole batch, as if it
had only some number of independent values per channel. That number, the effective values b, follows from the
share s of the variance that is between workers. For W workers with b independent values each, the expected
share is (W - 1) / (W·b - 1), hence

    b = ((W - 1) / s + 1) / W

Without the share it follows from the discrepancy d = mean |μ_worker - μ| / σ, which is about
√(2 / (π·b) · (1 - 1/W)). Values that depend on each other, as the positions of an image do, make b smaller
than the number of values, which is why b decides and not the batch.

Samples of shards that are drawn alike are independent, so that b is at least their number. Fewer effective
values than samples mean that the shards differ, for example in their labels. Such differences do not average
out over steps, and matter at more values: 4 workers with 64 samples each by label (b = 17) end 8 points below
the same with mixed labels (b = 68), 2 with 128 (b = 29) 4 points.

Effective values do not see that a sample is normalised by what it consists of itself: in a convolution with
two samples per worker, half of the values are its own. So few samples count as much as few values. A network
of 3 convolutions on MNIST (4 workers, 3 seeds, 600 steps) ends at .42 to .55 with 2 samples per worker, .69
to .75 synchronised, although its layers have 30 effective values and more; with 4 samples there is no
difference.

The layer with the fewest effective values decides. A layer behind a norm that is not synchronised sees equal
means from every worker, whose cost the layers before it have already borne.

Thresholds: Wu & He 2018 (GroupNorm), error of ResNet-50 by images per worker without synchronisation: 23.6 %
at 32, 23.7 at 16, 24.8 at 8, 27.3 at 4, 34.7 at 2. Goyal et al. 2017 advise against synchronisation at 32.
`docs/paper.md` has this project's figures: 4 workers with 2 samples lose more than half of the accuracy, 2
with 4 lose 5 points, and 4 with 16 are as good as synchronised ones.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from service.domain.statistics import Curve
from trainer.jobspec import BATCH_DEPENDENT_NORMS, MIN_CHANNEL_VALUES, JobSpec, MlpSpec, Norm

Decision = Literal["synchronise", "either", "no need", "cannot tell"]
Basis = Literal["measured", "predicted", "none"]

ENOUGH_VALUES = 12.0
"""Effective values, and samples, per worker from which synchronisation is not needed.

16 by the figures above. The estimate from a few batches scatters by a quarter.
"""
MIN_SAMPLES = 4
"""Samples per worker below which synchronisation is needed, however many values they have."""
MIN_SHARE_OF_SAMPLES = 0.75
"""Effective values per sample below which the shards differ; the estimate scatters by a quarter."""
ENOUGH_VALUES_OF_SHARDS = 64.0
"""Effective values from which shards that differ need no synchronisation.

Their means then differ by less than √(2 / (64·π)) = 0.1 standard deviations.
"""
MAX_VALUES = 1e6
"""Largest number of effective values that is reported; more cannot be distinguished from none."""
LAYER_METRIC = re.compile(r"probe/(?P<layer>.+)/(?P<name>variance_share|discrepancy|values_per_channel)")
COST_METRICS = ("probe/step_seconds", "probe/sync_seconds")
MEASURE = "probes.measure: variance_share and sync_cost"


@dataclass(frozen=True, kw_only=True)
class LayerAdvice:
    """Differences between workers at one layer."""

    layer: str
    values: float | None
    """Values per channel and worker; None if not measured."""
    effective_values: float
    """Independent values per channel and worker that would cause the same differences."""
    variance_share: float | None
    discrepancy: float | None
    shards_differ: bool
    """Whether the workers' samples are not drawn alike."""
    decision: Decision


@dataclass(frozen=True, kw_only=True)
class SyncCost:
    """Measured cost of synchronised statistics per step."""

    sync_seconds: float
    """Time of the collectives of all layers."""
    step_seconds: float | None
    """Time of a step of this job; None if it had none."""
    slowdown: float | None
    """Time of the collectives relative to a step without them; None if unknown."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Advice for one job."""

    decision: Decision
    reason: str
    basis: Basis
    """Whether the effective values are measured, or predicted for independent samples."""
    workers: int
    sync_group_size: int | None
    """Smallest group of workers whose shared statistics suffice; None if no group is needed or known."""
    layers: Sequence[LayerAdvice]
    """Layers in the order of their names, fewest effective values first among the reasons."""
    cost: SyncCost | None
    """None if not measured."""


def needed_metrics(names: Iterable[str]) -> list[str]:
    """Return those of a run's metrics that advice is based on."""
    return sorted(name for name in names if LAYER_METRIC.fullmatch(name) or name in COST_METRICS)


def advise(spec: JobSpec, curves: Mapping[str, Curve]) -> Advice:
    """Return the advice for a job.

    Args:
        spec: specification of the job.
        curves: curves of its run by metric, of `needed_metrics`.
    """
    workers = spec.max_workers
    layers = _measured(spec, curves)
    basis: Basis = "measured" if layers else "predicted"
    layers = layers or _predicted(spec)
    least = min(layers, key=lambda layer: layer.effective_values, default=None)
    decision: Decision = "no need" if workers == 1 else _of_samples(spec) if least is None else least.decision
    return Advice(
        decision=decision,
        reason=_reason(spec, least, basis),
        basis="none" if decision == "cannot tell" or workers == 1 else basis,
        workers=workers,
        sync_group_size=_group_size(spec, least) if decision in ("synchronise", "either") else None,
        layers=layers,
        cost=_cost(spec, curves),
    )


def effective_values(workers: int, *, share: float | None = None, discrepancy: float | None = None) -> float:
    """Return the independent values per channel and worker that cause a difference.

    The share is preferred: it is unbiased, and the discrepancy is too large for small batches, whose σ is
    estimated from few values.
    """
    if share is not None:
        values = ((workers - 1) / share + 1) / workers if share > 0 else math.inf
    elif discrepancy:
        values = 2 / (math.pi * discrepancy**2) * (1 - 1 / workers)
    else:
        values = math.inf
    return min(values, MAX_VALUES)


def decide(values: float, samples: float, *, shards_differ: bool = False) -> Decision:
    """Return the decision for effective values per channel, and samples, of a worker."""
    if samples < MIN_SAMPLES or values < (ENOUGH_VALUES_OF_SHARDS if shards_differ else MIN_CHANNEL_VALUES):
        return "synchronise"
    return "no need" if min(values, samples) >= ENOUGH_VALUES else "either"


def _of_samples(spec: JobSpec) -> Decision:
    return "synchronise" if spec.samples_per_worker < MIN_SAMPLES else "cannot tell"


def _measured(spec: JobSpec, curves: Mapping[str, Curve]) -> list[LayerAdvice]:
    if spec.max_workers == 1:
        return []
    found: dict[str, dict[str, float]] = {}
    for metric, curve in curves.items():
        values = [value for _, value in curve if math.isfinite(value)]
        if values and (match := LAYER_METRIC.fullmatch(metric)):
            # The median over time, since a single batch says little.
            found.setdefault(match["layer"], {})[match["name"]] = median(values)
    return [
        _layer(spec, layer, numbers)
        for layer, numbers in sorted(found.items())
        if {"variance_share", "discrepancy"} & numbers.keys()
    ]


def _layer(spec: JobSpec, layer: str, numbers: Mapping[str, float]) -> LayerAdvice:
    share, discrepancy = numbers.get("variance_share"), numbers.get("discrepancy")
    values = effective_values(spec.max_workers, share=share, discrepancy=discrepancy)
    # The discrepancy overestimates the difference of small batches, which is no evidence against the shards.
    shards_differ = share is not None and values < MIN_SHARE_OF_SAMPLES * spec.samples_per_worker
    return LayerAdvice(
        layer=layer,
        values=numbers.get("values_per_channel"),
        effective_values=values,
        variance_share=share,
        discrepancy=discrepancy,
        shards_differ=shards_differ,
        decision=decide(values, spec.samples_per_worker, shards_differ=shards_differ),
    )


def _predicted(spec: JobSpec) -> list[LayerAdvice]:
    """Predict a network without positions, whose workers draw samples alike."""
    if not isinstance(spec.model, MlpSpec) or spec.data_partition == "by_label" or spec.max_workers == 1:
        return []
    values = spec.samples_per_worker
    return [
        LayerAdvice(
            layer=path,
            values=values,
            effective_values=values,
            variance_share=None,
            discrepancy=None,
            shards_differ=False,
            decision=decide(values, values),
        )
        for path in spec.model.module_paths
        if path.startswith("norm")
    ]


def _group_size(spec: JobSpec, least: LayerAdvice | None) -> int:
    workers = spec.max_workers
    if least is None or least.shards_differ:  # a group of shards differs from the others too
        return workers
    smaller = min(least.effective_values, spec.samples_per_worker)
    sizes = [size for size in range(2, workers + 1) if workers % size == 0]
    return next((size for size in sizes if size * smaller >= ENOUGH_VALUES), workers)


def _reason(spec: JobSpec, least: LayerAdvice | None, basis: Basis) -> str:
    workers, samples = spec.max_workers, spec.samples_per_worker
    if workers == 1:
        return "one worker has the statistics of the whole batch"
    if least is None and samples >= MIN_SAMPLES:
        return f"nothing was measured; submit the job with {MEASURE}"
    parts = [
        f"{samples} samples per worker are fewer than {MIN_SAMPLES}"
        if least is None
        else _rule(least, samples)
    ]
    if basis == "predicted":
        parts.append(f"predicted for samples that are drawn alike, {MEASURE} would measure it")
    elif least is not None and least.shards_differ:
        parts.append(f"they are fewer than its {samples} samples per worker: the shards differ")
    elif least is not None and least.values is not None and least.effective_values < least.values / 2:
        parts.append(f"its {least.values:g} values depend on each other")
    if workers * samples < MIN_CHANNEL_VALUES:
        parts.append("all workers together have few samples too, so group normalisation may be better")
    if spec.norm not in BATCH_DEPENDENT_NORMS:
        parts.append(f"norm {spec.norm.value!r} uses no batch statistics, this is about batch normalisation")
    return "; ".join(parts)


def _rule(least: LayerAdvice, samples: int) -> str:
    """Describe the numbers that decide."""
    text = f"{least.layer} has {least.effective_values:.3g} effective values per channel and worker"
    fewest = ENOUGH_VALUES_OF_SHARDS if least.shards_differ else MIN_CHANNEL_VALUES
    if least.decision == "synchronise" and least.effective_values < fewest:
        return f"{text}, fewer than {fewest:g}"
    if least.decision == "synchronise":
        return f"{text}, but of {samples} samples, fewer than {MIN_SAMPLES}"
    if least.decision == "no need":
        return f"{text}, at least {ENOUGH_VALUES:g}"
    number = text if least.effective_values < ENOUGH_VALUES else f"{text}, but of {samples} samples"
    return f"{number}, fewer than {ENOUGH_VALUES:g}, so it may help"


def _cost(spec: JobSpec, curves: Mapping[str, Curve]) -> SyncCost | None:
    step, sync = (_last_median(curves.get(name, ())) for name in COST_METRICS)
    if sync is None or spec.max_workers == 1:
        return None
    without = None if step is None else step - sync if spec.norm is Norm.SYNC else step
    slowdown = sync / without if without is not None and without > 0 else None
    return SyncCost(sync_seconds=sync, step_seconds=step, slowdown=slowdown)


def _last_median(curve: Curve) -> float | None:
    values = [value for _, value in curve if math.isfinite(value)]
    return median(values) if values else None
