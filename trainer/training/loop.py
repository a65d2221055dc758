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
from trainer.data import Batch, Dataset
from trainer.distributed import RankInfo
from trainer.errors import Diverged, Preempted
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
from trainer.training.step_sync import NoNotices, PreemptionNotice, Requests, StepResult, StepSync
from trainer.worker_settings import configure

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
    loop = _Loop(
        spec, worker, logger, dataset, checkpoints, notices or NoNotices(), position or TrainProgress()
    )
    while not loop.finish_step():
        loop.train_step()
    remove_activation_checkpointing(loop.model)
    return Result(loop.model, loop.position.metrics, loop.position.step, loop.end)


class _Loop:
    """State of a training run between steps."""

    def __init__(
        self,
        spec: JobSpec,
        worker: RankInfo,
        logger: MetricsLogger,
        dataset: Dataset,
        checkpoints: Checkpoints | None,
        notices: PreemptionNotice,
        position: TrainProgress,
    ) -> None:
        """Build the model and what trains it, and load the newest checkpoint."""
        self._spec, self._worker, self._logger = spec, worker, logger
        self._checkpoints, self._notices, self.position = checkpoints, notices, position
        if worker.device.type == "cuda":
            configure(spec)
        seed_everything(worker, spec.seed)
        group = new_sync_groups(spec.sync_group_size) if spec.sync_group_size else None
        self.model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed, group)
        self.model.to(worker.device, torch.float64 if spec.precision == "fp64" else torch.float32)
        self._parallel = parallelise(self.model, spec, worker, dataset.shape)
        self._optimizer = build_optimizer(spec.optimizer, self.model)
        position.schedule_end = spec.steps
        self._schedule = build_schedule(spec.lr_schedule, self._optimizer, position)
        device = worker.device.type
        self._scaler = torch.amp.GradScaler(device, enabled=spec.precision == "fp16")
        self._autocast = torch.autocast(device, HALF.get(spec.precision), enabled=spec.precision in HALF)
        self._probes = Probes(spec, self.model, worker, self._autocast, self._scaler)
        self._state = TrainState(
            self.model, self._optimizer, self._schedule, self._scaler, self._probes, position, worker
        )
        self._evaluator = Evaluator(spec.evaluation, self.model, dataset, worker)
        self._step_sync = StepSync(worker, spec.collective_timeout_seconds)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        warm_up_ddp_buckets(self._parallel, spec, dataset.shape, worker)
        # After the warm-up and before the first batch: the state replaces everything that was drawn so far.
        if checkpoints is not None:
            logger.resume(checkpoints.load(self._state), checkpoints.refused)
            note = extend_schedule(spec, self._schedule, position)
            if note is not None and worker.rank == 0:
                print(note, flush=True)
        self._batches = dataset.train(position.step)
        now = time.monotonic()
        self._began, self._saved_at, self._polled_at = now - position.seconds, now, now
        self._saved = position.step
        is_late = spec.max_train_seconds is not None and position.seconds >= spec.max_train_seconds
        self._requests = Requests(stop=is_late)
        """Requests of the newest step, equal on every worker."""

    @property
    def end(self) -> Literal["finished", "stopped early", "deadline"]:
        """How the run has ended."""
        if self.position.step >= self._spec.steps:
            return "finished"
        return "deadline" if self._requests.stop else "stopped early"

    def finish_step(self) -> bool:
        """Evaluate and save if it is time to; return whether the run has ended.

        All workers call it once per step, and before the first one.

        Raises Diverged and Preempted as `train` does.
        """
        spec, step = self._spec, self.position.step
        stop_reason = self._stop_reason()
        is_best = False
        is_last = step >= spec.steps or self._requests.stop
        if (step % spec.eval_every == 0 or is_last) and self.position.last_eval_step < step:
            is_best = self._evaluate()
        self._logger.update(step)
        is_done = is_last or should_stop(spec.early_stop, self.position)
        if self._checkpoints is not None:
            every = spec.checkpoint.every
            is_due = self._requests.save or is_best or (every is not None and step % every == 0)
            if (is_due or is_done or stop_reason) and self._saved < step:
                self.position.seconds = time.monotonic() - self._began
                self._checkpoints.save(self._state)
                self._saved, self._saved_at = step, time.monotonic()
            if is_done or stop_reason or self._requests.raise_error:
                self._checkpoints.wait()
        if stop_reason and not is_done:
            raise Preempted(step, stop_reason)
        return is_done

    def train_step(self) -> None:
        """Train on the next batch. Raises Diverged as `train` does."""
        step = self.position.step
        parts = next(self._batches)
        self._optimizer.zero_grad(set_to_none=True)
        if self._probes.are_due(step):
            measured = self._probes.measure(parts, self._learning_rate())
            self._logger.log(step, measured, "probes")
        self._probes.timer.begin()
        synced = self._backward(parts)  # equal on every worker, so all of them take the same branches below
        if not synced.is_finite:
            raise Diverged(step + 1, "the training loss is not finite")
        if self._spec.max_grad_norm is not None:
            self._scaler.unscale_(self._optimizer)
            clip_grad_norm(self._parameters, self._spec.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scaler.is_enabled() and self._scaler.get_scale() < MIN_LOSS_SCALE:
            raise Diverged(step + 1, "the gradients overflow under every loss scale")
        self._schedule.step()
        self._probes.timer.end()
        self.position.step = step + 1
        self.position.loss_sum += synced.loss_sum
        self.position.samples += self._spec.global_batch_size
        self._requests = synced.requests

    def _evaluate(self) -> bool:
        """Evaluate, and return whether the model is the best so far, which is to be saved."""
        position = self.position
        with self._autocast:
            metrics = dict(self._evaluator.evaluate(position.step))
        if position.samples:
            metrics["train_loss"] = position.loss_sum / position.samples
        metrics["learning_rate"] = self._learning_rate()
        if not all(math.isfinite(value) for value in metrics.values()):
            raise Diverged(position.step, f"metrics are not finite ({metrics})")
        position.metrics, position.statistics = metrics, self._evaluator.statistics
        position.last_eval_step = position.step
        position.loss_sum, position.samples = 0.0, 0
        update(self._spec.early_stop, position)
        is_best = update_best(self._spec.checkpoint, position)
        # Not among the position's metrics, which are equal on all workers and in every attempt.
        seconds = time.monotonic() - self._began
        self._logger.log(position.step, metrics | {TRAIN_SECONDS: seconds})
        return is_best

    def _backward(self, parts: list[Batch]) -> StepResult:
        """Add up the gradients of a step's parts, and return the step's collective."""
        worker = self._worker
        loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        for number, part in enumerate(parts, start=1):
            is_last_part = number == len(parts)
            with no_sync(self._parallel, unless=is_last_part):
                with self._autocast:
                    loss = F.cross_entropy(self._parallel(part.inputs), part.labels, reduction="sum")  # ()
                loss_sum += loss.detach()  # float64
                if is_last_part:
                    self._step_sync.begin(loss_sum, self._new_requests() if worker.rank == 0 else Requests())
                # DDP divides by the world size W; the gradient must be that of the mean over all n samples.
                share = loss * (worker.world_size / self._spec.global_batch_size)
                self._scaler.scale(share).backward()  # type: ignore[no-untyped-call]
        return self._step_sync.finish()

    def _new_requests(self) -> Requests:
        """Return what the first worker requests of all."""
        spec, now = self._spec, time.monotonic()
        is_poll = now - self._polled_at >= PREEMPTION_POLL_INTERVAL_SECONDS
        return Requests(
            save=spec.checkpoint.every is None and now - self._saved_at >= CHECKPOINT_INTERVAL_SECONDS,
            stop=spec.max_train_seconds is not None and now - self._began >= spec.max_train_seconds,
            check_preemption=is_poll,
            raise_error=self._checkpoints is not None and self._checkpoints.has_failed,
            interrupt=is_poll and self._notices.is_stop_requested(),
        )

    def _stop_reason(self) -> str | None:
        """Return why the run is to stop before its end, or None.

        A barrier of all workers if the newest step asked for a query of Ray.
        """
        if self._requests.interrupt:
            return "stopped on request of the service"
        if self._requests.check_preemption:
            self._polled_at = time.monotonic()
            return "a node is about to be preempted" if self._notices.is_preempted() else None
        return None

    def _learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])
