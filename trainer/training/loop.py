"""Training loop."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from syncbn import new_sync_groups
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress, TrainState, seed_everything
from trainer.data import Dataset
from trainer.distributed import RankInfo
from trainer.errors import Diverged, Preempted
from trainer.gpu import configure
from trainer.jobspec import TRAIN_SECONDS, JobSpec
from trainer.models import build_model
from trainer.probes import Probes
from trainer.tracking.logger import MetricsLogger
from trainer.training.early_stopping import should_stop, update, update_best
from trainer.training.evaluate import Evaluator
from trainer.training.optim import build_optimizer, build_schedule, extend_schedule
from trainer.training.parallel import (
    clip_grad_norm,
    no_sync,
    parallelise,
    remove_activation_checkpointing,
    warm_up_ddp_buckets,
)
from trainer.training.step_sync import NoNotices, PreemptionNotice, Requests, StepSync

CHECKPOINT_INTERVAL_SECONDS = 60.0
PREEMPTION_POLL_INTERVAL_SECONDS = 2.0
"""Interval between queries for preemption notices; a drained node usually has half a minute or more."""
MIN_LOSS_SCALE = 2.0**-14
"""Lower limit of the fp16 loss scale. The scale is halved whenever gradients overflow: 30 times in a row from
its initial value.
"""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Result:
    """Result of a run."""

    model: nn.Module
    metrics: dict[str, float]
    step: int
    end: Literal["finished", "stopped early", "deadline"]


def train(
    spec: JobSpec,
    worker: RankInfo,
    logger: MetricsLogger,
    dataset: Dataset,
    checkpoints: Checkpoints | None = None,
    notices: PreemptionNotice | None = None,
    position: TrainProgress | None = None,
) -> Result:
    """Train a model and return it with its last metrics.

    Every worker calls this function and gets the same metrics. The loss of a step is the mean over the global
    batch. Gradients are averaged over W workers, so a worker's loss is the sum over its own samples times
    W/n, which is also exact for shares of unequal size. With `checkpoints`, training resumes from the newest
    one, and returns once the last one exists. The caller can read the progress from `position`.

    Raises, on every worker at the same step: Diverged if the loss of any worker is not finite; Preempted,
    after a checkpoint, if `notices` announce the preemption of a node or the service asks to stop.
    """
    notices, position = notices or NoNotices(), position or TrainProgress()
    if worker.device.type == "cuda":
        configure(spec)
    seed_everything(worker, spec.seed)
    group = new_sync_groups(spec.sync_group_size) if spec.sync_group_size else None
    model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed, group)
    model.to(worker.device, torch.float64 if spec.precision == "fp64" else torch.float32)
    parallel = parallelise(model, spec, worker, dataset.shape)
    optimizer = build_optimizer(spec.optimizer, model)
    position.schedule_end = spec.steps
    schedule = build_schedule(spec.lr_schedule, optimizer, position)
    scaler = torch.amp.GradScaler(worker.device.type, enabled=spec.precision == "fp16")
    autocast = torch.autocast(worker.device.type, HALF.get(spec.precision), enabled=spec.precision in HALF)
    probes = Probes(spec, model, worker, autocast, scaler)
    state = TrainState(model, optimizer, schedule, scaler, probes, position, worker)
    evaluator = Evaluator(spec.evaluation, model, dataset, worker)
    step_sync = StepSync(worker, spec.collective_timeout_seconds)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    warm_up_ddp_buckets(parallel, spec, dataset.shape, worker)
    # After the warm-up and before the first batch: the state replaces everything that was drawn so far.
    if checkpoints is not None:
        logger.resume(checkpoints.load(state), checkpoints.refused)
        if (note := extend_schedule(spec, schedule, position)) is not None and worker.rank == 0:
            print(note, flush=True)
    batches = dataset.train(position.step)
    began = time.monotonic() - position.seconds
    saved, saved_at, polled_at = position.step, time.monotonic(), time.monotonic()
    is_late = spec.max_train_seconds is not None and position.seconds >= spec.max_train_seconds
    save_now = save_failed = False
    stop_reason: str | None = None

    while True:
        step = position.step
        if (step % spec.eval_every == 0 or step >= spec.steps or is_late) and position.last_eval_step < step:
            with autocast:
                metrics = dict(evaluator.evaluate(step))
            if position.samples:
                metrics["train_loss"] = position.loss_sum / position.samples
            metrics["learning_rate"] = float(schedule.get_last_lr()[0])
            if not all(math.isfinite(value) for value in metrics.values()):
                raise Diverged(step, f"metrics are not finite ({metrics})")
            position.metrics, position.statistics, position.last_eval_step = (
                metrics,
                evaluator.statistics,
                step,
            )
            position.loss_sum, position.samples = 0.0, 0
            update(spec.early_stop, position)
            save_now |= update_best(spec.checkpoint, position)
            # Not among the position's metrics, which are equal on all workers and in every attempt.
            logger.log(step, metrics | {TRAIN_SECONDS: time.monotonic() - began})
        logger.update(step)

        is_done = step >= spec.steps or is_late or should_stop(spec.early_stop, position)
        is_due = (
            save_now or is_done or (spec.checkpoint.every is not None and step % spec.checkpoint.every == 0)
        )
        if checkpoints is not None and (is_due or stop_reason) and saved < step:
            position.seconds = time.monotonic() - began
            checkpoints.save(state)
            saved, saved_at = step, time.monotonic()
        if checkpoints is not None and (is_done or stop_reason or save_failed):
            checkpoints.wait()
        if is_done:
            break
        if stop_reason:
            raise Preempted(step, stop_reason)

        parts = next(batches)
        optimizer.zero_grad(set_to_none=True)
        if probes.are_due(step):
            logger.log(step, probes.measure(parts, float(schedule.get_last_lr()[0])), "probes")
        probes.timer.begin()
        loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        for number, part in enumerate(parts, start=1):
            is_last_part = number == len(parts)
            with no_sync(parallel, unless=is_last_part):
                with autocast:
                    loss = F.cross_entropy(parallel(part.inputs), part.labels, reduction="sum")  # ()
                loss_sum += loss.detach()  # float64
                if is_last_part:
                    now = time.monotonic()
                    is_poll = now - polled_at >= PREEMPTION_POLL_INTERVAL_SECONDS
                    requests = Requests(
                        save=spec.checkpoint.every is None and now - saved_at >= CHECKPOINT_INTERVAL_SECONDS,
                        stop=spec.max_train_seconds is not None and now - began >= spec.max_train_seconds,
                        check_preemption=is_poll,
                        raise_error=checkpoints is not None and checkpoints.has_failed,
                        interrupt=is_poll and worker.rank == 0 and notices.is_stop_requested(),
                    )
                    step_sync.begin(loss_sum, requests if worker.rank == 0 else Requests())
                # DDP divides by the world size W; the gradient must be that of the mean over all n samples.
                share = loss * (worker.world_size / spec.global_batch_size)
                scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        synced = step_sync.finish()  # equal on every worker, so all of them take the same branches below
        if not synced.is_finite:
            raise Diverged(step + 1, "the training loss is not finite")
        if spec.max_grad_norm is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm(parameters, spec.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < MIN_LOSS_SCALE:
            raise Diverged(step + 1, "the gradients overflow under every loss scale")
        schedule.step()
        probes.timer.end()
        position.step = step + 1
        position.loss_sum += synced.loss_sum
        position.samples += spec.global_batch_size
        save_now, is_late, save_failed = (
            synced.requests.save,
            synced.requests.stop,
            synced.requests.raise_error,
        )
        if synced.requests.check_preemption:
            polled_at = time.monotonic()
            stop_reason = "a node is about to be preempted" if notices.is_preempted() else None
        if synced.requests.interrupt:
            stop_reason = "stopped on request of the service"

    remove_activation_checkpointing(model)
    if position.step >= spec.steps:
        return Result(model, position.metrics, position.step, "finished")
    return Result(model, position.metrics, position.step, "deadline" if is_late else "stopped early")
