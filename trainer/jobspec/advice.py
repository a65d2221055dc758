"""Warnings about valid specs: fields without effect, or with a surprising one."""

from collections.abc import Iterator

from trainer.jobspec.job import JobSpec, Norm
from trainer.jobspec.metrics import metric_direction
from trainer.jobspec.optimizers import StepSchedule, depends_on_steps

SHARES_BATCH = (Norm.BATCH, Norm.SYNC)
"""Norms whose statistics depend on the batch."""


def spec_warnings(spec: JobSpec) -> list[str]:
    """List what is worth a warning, each as `field: text (got value)`."""
    return [*_schedule(spec), *_directions(spec), *_batches(spec)]


def _schedule(spec: JobSpec) -> Iterator[str]:
    schedule = spec.schedule
    if schedule.warmup_steps >= spec.steps:
        yield f"schedule.warmup_steps: the warm-up is not over within {spec.steps} steps (got {schedule.warmup_steps})"
    if isinstance(schedule, StepSchedule):
        late = [step for step in schedule.steps if step + schedule.warmup_steps >= spec.steps]
        if late:
            yield f"schedule.steps: {', '.join(map(str, late))} come after the run's {spec.steps} steps (got {schedule.steps})"
    if spec.on_extend is not None and not depends_on_steps(schedule):
        yield f"on_extend: has no effect on a {schedule.name} schedule (got {spec.on_extend!r})"


def _directions(spec: JobSpec) -> Iterator[str]:
    choices = [("checkpoint.best_mode", spec.checkpoint.keep_best, spec.checkpoint.best_mode)]
    if spec.early_stop is not None:
        choices.append(("early_stop.mode", spec.early_stop.metric, spec.early_stop.mode))
    for field, metric, mode in choices:
        if metric is not None and mode is not None and mode != metric_direction(metric):
            better = "largest" if metric_direction(metric) == "max" else "smallest"
            yield f"{field}: the {better} {metric} is the best (got {mode!r})"


def _batches(spec: JobSpec) -> Iterator[str]:
    if spec.parallel == "fsdp" and spec.max_workers == 1:
        yield "parallel: has no effect on one worker (got 'fsdp')"
    if spec.norm not in SHARES_BATCH:
        return
    if spec.accumulate > 1:
        part = spec.global_batch_size // spec.accumulate
        yield (
            f"accumulate: under norm {spec.norm.value!r} the statistics are of each part of {part} samples, "
            f"not of the whole batch (got {spec.accumulate})"
        )
    if spec.evaluation.statistics == "batch":
        yield "evaluation.statistics: the exported model holds moving averages instead (got 'batch')"
