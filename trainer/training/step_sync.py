"""Synchronisation of each step: loss, finite flag, requests of workers.

One collective of a few numbers is issued before the backward pass and awaited after it. It is hidden behind
the backward pass, and all workers act on the same values in the same step.
"""

from dataclasses import astuple, dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import RankInfo


@dataclass(frozen=True)
class Requests:
    """Requests of a worker for the time after this step; one worker's flag suffices."""

    save: bool = False
    stop: bool = False
    check_preemption: bool = False
    """Query Ray for preemption notices: a separate collective, and slow."""
    raise_error: bool = False
    """Raise the error of a checkpoint that could not be written."""
    interrupt: bool = False
    """Save a checkpoint and end the attempt."""


@dataclass(frozen=True)
class StepResult:
    """Result of a step's collective, equal on all workers."""

    loss_sum: float
    """Sum of the losses of all samples of the global batch."""
    is_finite: bool
    requests: Requests


class StepSync:
    """All-reduce of one float64 vector per step over all workers.

    On GPUs it uses a gloo group next to NCCL, so that it does not wait for kernels.
    """

    def __init__(self, worker: RankInfo, timeout_seconds: float) -> None:
        self._worker = worker
        is_cuda = worker.device.type == "cuda"
        self._group = worker.new_gloo_group(timeout_seconds) if is_cuda else None
        self._vector = torch.zeros(7, dtype=torch.float64)
        self._pending: dist.Work | None = None

    def begin(self, loss_sum: Tensor, requests: Requests) -> None:
        """Start the collective; waits until `loss_sum` is computed, not for later work."""
        loss = float(loss_sum)  # waits for the device
        finite = float("-inf") < loss < float("inf")
        flags = (not finite, *astuple(requests))
        # A loss that is not finite travels as a flag: its sum over workers could hide the others.
        self._vector = torch.tensor(
            [loss if finite else 0.0, *map(float, flags)], dtype=torch.float64
        )  # (7,)
        self._pending = self._worker.start_all_reduce(self._vector, self._group)

    def finish(self) -> StepResult:
        """Wait for the collective and return its result."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        loss, broken, *requests = self._vector.tolist()
        return StepResult(loss, broken == 0, Requests(*(flag > 0 for flag in requests)))


class PreemptionNotice(Protocol):
    """Preemption notices of the cluster."""

    def is_preempted(self) -> bool:
        """Return whether the node of any worker will be taken away.

        All workers call it together and get the same answer.
        """

    def is_stop_requested(self) -> bool:
        """Return whether the service has asked the attempt to end; only rank 0 calls it."""


class NoNotices:
    """Source of preemption notices that has none."""

    def is_preempted(self) -> bool:
        """Return False."""
        return False

    def is_stop_requested(self) -> bool:
        """Return False."""
        return False
