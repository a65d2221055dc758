"""Optimizers and learning rate schedules."""

import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LambdaLR

from trainer.checkpoint.state import TrainProgress
from trainer.errors import ConfigurationError
from trainer.jobspec import (
    AdamWSpec,
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    JobSpec,
    OptimizerSpec,
    ScheduleSpec,
    SgdSpec,
    StepSchedule,
    TorchOptimizerSpec,
    depends_on_steps,
)

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer.

    Unless `spec.decay_all`, weight decay excludes biases and the scale and shift of norms. Raises
    ConfigurationError if torch rejects the values of `spec.arguments`.
    """
    kept = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("bias") or parameter.ndim <= 1 or isinstance(module, NORMS)
    }
    if spec.decay_all:
        kept = set()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    match spec:
        case SgdSpec():
            return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)
        case AdamWSpec():
            return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps)
        case TorchOptimizerSpec():
            kind = getattr(torch.optim, spec.name.removeprefix("torch:"))
            # torch requires tuples, which JSON does not have.
            arguments = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in spec.arguments.items()
            }
            try:
                optimizer: torch.optim.Optimizer = kind(groups, lr=spec.lr, **arguments)
            except Exception as error:  # torch checks some values by using them
                rule = f"must be valid arguments of {spec.name}: {error}"
                raise ConfigurationError("optimizer.arguments", spec.arguments, rule) from error
            return optimizer


def build_schedule(spec: ScheduleSpec, optimizer: torch.optim.Optimizer, position: TrainProgress) -> LambdaLR:
    """Build the learning rate schedule; call its `step` after each optimizer step.

    It runs from `position.schedule_start` to `position.schedule_end`, which may change in between.
    """

    def factor(step: int) -> float:
        return rate_factor(
            spec, step - position.schedule_start, position.schedule_end - position.schedule_start
        )

    return LambdaLR(optimizer, factor)


def extend_schedule(spec: JobSpec, schedule: LambdaLR, position: TrainProgress) -> str | None:
    """Adapt a restored schedule to a changed number of steps, by `spec.on_extend`.

    Returns a line for the log, or None if nothing changes. Raises ConfigurationError if the schedule depends
    on the number of steps, which has changed, and `spec.on_extend` is not set.
    """
    before = position.schedule_end
    if not depends_on_steps(spec.lr_schedule) or spec.steps == before or spec.steps <= position.step:
        return None
    match spec.on_extend:
        case None:
            rule = (
                f"must be continue, restart or rescale: the run was saved with a {spec.lr_schedule.name} "
                f"schedule over {before} steps and is resumed with {spec.steps}"
            )
            raise ConfigurationError("on_extend", None, rule)
        case "continue":
            return (
                f"on_extend: the {spec.lr_schedule.name} schedule still ends at step {before}; "
                "its last rate is kept after it"
            )
        case "restart":
            position.schedule_start = position.step
        case "rescale":
            pass
    position.schedule_end = spec.steps
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)
    # LambdaLR has no public way to recompute the rate without a step.
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
    began = "" if spec.on_extend == "rescale" else f"restarts at step {position.schedule_start} and "
    return (
        f"on_extend: the {spec.lr_schedule.name} schedule {began}ends at step {spec.steps} "
        f"instead of {before}"
    )


def rate_factor(spec: ScheduleSpec, step: int, steps: int) -> float:
    """Return the learning rate factor of step `step` (from 0) of `steps`.

    It depends only on the arguments, so that training can resume at any step. With t = step - warmup_steps:

        constant     1
        step         factor^(number of `spec.steps` ≤ step)
        exponential  factor^(t / every)
        cosine       final + (1 - final) · (1 + cos(π·t / (steps - warmup_steps))) / 2

    During the warm-up it is warmup_factor + (1 - warmup_factor) · (step + 1) / warmup_steps (Goyal et al.
    2017, section 2.2).
    """
    if step < spec.warmup_steps:
        return spec.warmup_factor + (1 - spec.warmup_factor) * (step + 1) / spec.warmup_steps
    passed = step - spec.warmup_steps
    match spec:
        case ConstantSchedule():
            return 1.0
        case StepSchedule():
            return float(spec.factor ** sum(at <= step for at in spec.steps))
        case ExponentialSchedule():
            return float(spec.factor ** (passed / spec.every))
        case CosineSchedule():
            share = min(1.0, passed / max(1, steps - spec.warmup_steps))
            return spec.final_factor + (1 - spec.final_factor) * (1 + math.cos(math.pi * share)) / 2
