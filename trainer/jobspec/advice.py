"""Warnings about valid specifications: fields with no effect or a surprising one."""

from collections.abc import Iterator

from trainer.jobspec.data import known_shape
from trainer.jobspec.job import JobSpec, Norm
from trainer.jobspec.metrics import metric_direction
from trainer.jobspec.models import CnnSpec, MlpSpec
from trainer.jobspec.optimizers import StepSchedule, depends_on_steps

BATCH_DEPENDENT_NORMS = (Norm.BATCH, Norm.SYNC)
"""Norms whose statistics depend on the batch."""

MIN_CHANNEL_VALUES = 8
"""Values per channel below which statistics cost accuracy.

ResNet-50's error without synchronisation is 23.6 % at 32 images per worker, 24.8 at 8, 27.3 at 4 and
34.7 at 2 (Wu & He 2018).
"""


def spec_warnings(spec: JobSpec) -> list[str]:
    """Return warnings about a specification, each as `field: text (got value)`."""
    return [*_schedule(spec), *_directions(spec), *_batches(spec), *_few_values(spec)]


def _schedule(spec: JobSpec) -> Iterator[str]:
    schedule = spec.lr_schedule
    if schedule.warmup_steps >= spec.steps:
        yield (
            f"lr_schedule.warmup_steps: the warm-up does not end within {spec.steps} steps "
            f"(got {schedule.warmup_steps})"
        )
    if isinstance(schedule, StepSchedule):
        late = [step for step in schedule.steps if step + schedule.warmup_steps >= spec.steps]
        if late:
            yield (
                f"lr_schedule.steps: {', '.join(map(str, late))} are after the last of {spec.steps} steps "
                f"(got {schedule.steps})"
            )
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
    if spec.norm not in BATCH_DEPENDENT_NORMS:
        return
    if spec.gradient_accumulation_steps > 1:
        part = spec.global_batch_size // spec.gradient_accumulation_steps
        yield (
            f"gradient_accumulation_steps: under norm {spec.norm.value!r} statistics are computed over each "
            f"part of {part} samples, not over the whole batch (got {spec.gradient_accumulation_steps})"
        )
    if spec.evaluation.statistics == "batch":
        yield "evaluation.statistics: the exported model uses moving averages instead (got 'batch')"


def _few_values(spec: JobSpec) -> Iterator[str]:
    """Warn about statistics over few values, of a worker or a group of workers."""
    group = spec.sync_group_size if spec.norm is Norm.SYNC else 1
    if spec.norm not in (Norm.BATCH, Norm.SYNC) or group is None:
        return
    samples = group * spec.samples_per_worker
    if samples >= MIN_CHANNEL_VALUES:
        return
    positions = 1 if isinstance(spec.model, MlpSpec) else _least_positions(spec)
    if positions is not None and samples * positions < MIN_CHANNEL_VALUES:
        count = samples * positions
        effect = f"{count} values per channel cost accuracy, at least {MIN_CHANNEL_VALUES} are needed"
    else:  # positions of an image are not independent, and those of other models are not known here
        effect = (
            f"fewer than {MIN_CHANNEL_VALUES} may cost accuracy, also with many positions in each, which "
            "depend on each other"
        )
    if spec.max_workers > group:
        remedy = f"over all workers, by 'sync', they are of {spec.max_workers * spec.samples_per_worker}"
    else:
        remedy = "a larger global_batch_size, or norm 'group', avoids it"
    yield f"norm: statistics are of {samples} samples; {effect}; {remedy} (got {spec.norm.value!r})"


def _least_positions(spec: JobSpec) -> int | None:
    """Return the positions of the smallest normalised feature map, if derivable."""
    shape = known_shape(spec.data)
    if not isinstance(spec.model, CnnSpec) or shape is None:
        return None
    halvings = len(spec.model.channels) - 1
    _, height, width = shape
    return max(1, height >> halvings) * max(1, width >> halvings)
