"""Synchronisation of each step: loss, finite flag, requests of workers.

One collective of a few numbers, issued before the backward pass and awaited after it, so that it costs next to nothing, and every
worker acts on the same answer in the same step.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import RankInfo


@dataclass(frozen=True)
class Requests:
    """What a worker wants all of them to do after this step; one worker's flag is enough."""

    save: bool = False
    stop: bool = False
    look: bool = False
    """Ask Ray whether a node is about to go: a collective of its own, and slow."""
    report: bool = False
    """Raise the error of a checkpoint that could not be written."""


@dataclass(frozen=True)
class StepResult:
    """What all workers know after a step's collective."""

    loss_sum: float
    """Sum of the losses of all samples of the global batch."""
    is_finite: bool
    requests: Requests


class StepSync:
    """One float64 vector a step, summed over all workers; on GPUs by gloo beside NCCL, so that it does not wait for kernels."""

    def __init__(self, worker: RankInfo, timeout_seconds: float) -> None:
        self._group: Any = None
        self._world_size = worker.world_size
        if worker.world_size > 1 and worker.device.type == "cuda":
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._vector = torch.zeros(6, dtype=torch.float64)
        self._pending: dist.Work | None = None

    def begin(self, loss_sum: Tensor, requests: Requests) -> None:
        """Send this worker's part; waits for `loss_sum` to be computed, not for anything after it."""
        loss = float(loss_sum)
        finite = float("-inf") < loss < float("inf")
        flags = (not finite, requests.save, requests.stop, requests.look, requests.report)
        self._vector = torch.tensor([loss if finite else 0.0, *map(float, flags)], dtype=torch.float64)
        if self._world_size > 1:
            self._pending = dist.all_reduce(self._vector, group=self._group, async_op=True)

    def finish(self) -> StepResult:
        """Wait for all workers' parts."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        loss, broken, *requests = self._vector.tolist()
        return StepResult(loss, broken == 0, Requests(*(flag > 0 for flag in requests)))


class PreemptionNotice(Protocol):
    """Preemption notices of the cluster."""

    def is_preempted(self) -> bool:
        """Ask whether the node of any worker will be taken away; called by all workers together, with one answer for all."""


class NoNotices:
    """Preemption notices of a cluster that has none."""

    def is_preempted(self) -> bool:
        """Say no."""
        return False
