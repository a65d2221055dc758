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
from trainer.jobspec import JobSpec
from trainer.models import build_model
from trainer.probes import Probes
from trainer.tracking.logger import MetricsLogger
from trainer.training.early_stopping import should_stop, update, update_best
from trainer.training.evaluate import Evaluator
from trainer.training.optim import build_optimizer, build_schedule, extend_schedule
from trainer.training.parallel import clip, no_sync, parallelise, remove_activation_checkpointing, warm_up_ddp_buckets
from trainer.training.step_sync import NoNotices, PreemptionNotice, Requests, StepSync

SECONDS_BETWEEN_CHECKPOINTS = 60.0
SECONDS_BETWEEN_LOOKS = 2.0
"""At the cluster's notices: a node that is drained usually has half a minute or more."""
LEAST_SCALE = 2.0**-14
"""Of the loss in fp16, which is halved whenever gradients overflow: 30 times in a row from where it begins."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    model: nn.Module
    metrics: dict[str, float]
    step: int
    end: Literal["finished", "stopped early", "deadline"]


def train(
    spec: JobSpec,
    worker: RankInfo,
    journal: MetricsLogger,
    dataset: Dataset,
    checkpoints: Checkpoints | None = None,
    notices: PreemptionNotice | None = None,
    position: TrainProgress | None = None,
) -> Result:
    """Train by `spec` and return the model and its last metrics; every worker calls it and gets the same metrics.

    Each step's loss is the mean over the global batch. Gradients are averaged over W workers, so a worker's share is the sum over
    its own samples times W/n: exact also where the batch cannot be divided evenly. With `checkpoints`, it goes on from the newest
    one, and returns once the last one exists; `position` is where the caller can see how far it is.

    Raises, on every worker at the same step: Diverged, if the loss of any worker is not finite; Preempted, once everything is
    saved, if `notices` announce the preemption of a node.
    """
    notices, position = notices or NoNotices(), position or TrainProgress()
    seed_everything(worker, spec.seed)
    group = new_sync_groups(spec.sync_group_size) if spec.sync_group_size else None
    model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed, group)
    model.to(worker.device, torch.float64 if spec.precision == "fp64" else torch.float32)
    parallel = parallelise(model, spec, worker, dataset.shape)
    optimizer = build_optimizer(spec.optimizer, model)
    position.schedule_end = spec.steps
    schedule = build_schedule(spec.schedule, optimizer, position)
    scaler = torch.amp.GradScaler(worker.device.type, enabled=spec.precision == "fp16")
    autocast = torch.autocast(worker.device.type, HALF.get(spec.precision), enabled=spec.precision in HALF)
    probes = Probes(spec, model, worker, autocast, scaler)
    state = TrainState(model, optimizer, schedule, scaler, probes, position, worker)
    evaluator = Evaluator(spec.evaluation, model, dataset, worker)
    control = StepSync(worker, spec.collective_timeout_seconds)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    warm_up_ddp_buckets(parallel, spec, dataset.shape, worker)
    if checkpoints is not None:
        journal.resume(checkpoints.load(state), checkpoints.refused)
        if (note := extend_schedule(spec, schedule, position)) is not None and worker.rank == 0:
            print(note, flush=True)
    batches = dataset.train(position.step)
    began = time.monotonic() - position.seconds
    saved, saved_at, looked_at = position.step, time.monotonic(), time.monotonic()
    is_late = spec.deadline_seconds is not None and position.seconds >= spec.deadline_seconds
    save_now = node_goes = failed_to_save = False

    while True:
        step = position.step
        if (step % spec.eval_every == 0 or step >= spec.steps or is_late) and position.evaluated < step:
            with autocast:
                metrics = dict(evaluator.evaluate(step))
            if position.samples:
                metrics["train_loss"] = position.loss_sum / position.samples
            metrics["learning_rate"] = float(schedule.get_last_lr()[0])
            if not all(math.isfinite(value) for value in metrics.values()):
                raise Diverged(step, f"the evaluation is not finite ({metrics})")
            position.metrics, position.statistics, position.evaluated = metrics, evaluator.statistics, step
            position.loss_sum, position.samples = 0.0, 0
            update(spec.early_stop, position)
            save_now |= update_best(spec.checkpoint, position)
            journal.log(step, metrics)
        journal.update(step)

        is_done = step >= spec.steps or is_late or should_stop(spec.early_stop, position)
        is_due = save_now or is_done or (spec.checkpoint.every is not None and step % spec.checkpoint.every == 0)
        if checkpoints is not None and (is_due or node_goes) and saved < step:
            position.seconds = time.monotonic() - began
            checkpoints.save(state)
            saved, saved_at = step, time.monotonic()
        if checkpoints is not None and (is_done or node_goes or failed_to_save):
            checkpoints.wait()
        if is_done:
            break
        if node_goes:
            raise Preempted(step)

        parts = next(batches)
        optimizer.zero_grad(set_to_none=True)
        if probes.are_due(step):
            journal.log(step, probes.measure(parts, float(schedule.get_last_lr()[0])), "probes")
        loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        for number, part in enumerate(parts, start=1):
            is_last_part = number == len(parts)
            with no_sync(parallel, unless=is_last_part):
                with autocast:
                    loss = F.cross_entropy(parallel(part.inputs), part.labels, reduction="sum")
                loss_sum += loss.detach()
                if is_last_part:
                    now = time.monotonic()
                    requests = Requests(
                        save=spec.checkpoint.every is None and now - saved_at >= SECONDS_BETWEEN_CHECKPOINTS,
                        stop=spec.deadline_seconds is not None and now - began >= spec.deadline_seconds,
                        look=now - looked_at >= SECONDS_BETWEEN_LOOKS,
                        report=checkpoints is not None and checkpoints.has_failed,
                    )
                    control.begin(loss_sum, requests if worker.rank == 0 else Requests())
                share = loss * (worker.world_size / spec.global_batch_size)
                scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        agreed = control.finish()
        if not agreed.is_finite:
            raise Diverged(step + 1, "the training loss is not finite")
        if spec.clip_norm is not None:
            scaler.unscale_(optimizer)
            clip(parameters, spec.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
            raise Diverged(step + 1, "the gradients overflow under every loss scale")
        schedule.step()
        position.step = step + 1
        position.loss_sum += agreed.loss_sum
        position.samples += spec.global_batch_size
        save_now, is_late, failed_to_save = agreed.requests.save, agreed.requests.stop, agreed.requests.report
        if agreed.requests.look:
            looked_at, node_goes = time.monotonic(), notices.is_preempted()

    remove_activation_checkpointing(model)
    if position.step >= spec.steps:
        return Result(model, position.metrics, position.step, "finished")
    return Result(model, position.metrics, position.step, "deadline" if is_late else "stopped early")
