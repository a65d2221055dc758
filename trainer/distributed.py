"""Rank, world size and device of this process; collectives of the trainer.

Every worker must call each collective, in the same order. With one worker they return immediately.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
"""Process group of the participating workers; None for all workers."""


@dataclass(frozen=True)
class RankInfo:
    """Rank, world size and device of this process.

    With more than one worker, torch's default process group is initialised.
    """

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, values: Tensor, group: Group = None) -> Tensor:
        """Sum `values` over the workers of a group, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=group)
        return values

    def start_all_reduce(self, values: Tensor, group: Group = None) -> dist.Work | None:
        """Start a sum of `values` over the workers, in place; `wait` completes it."""
        return dist.all_reduce(values, group=group, async_op=True) if self.world_size > 1 else None

    def broadcast(self, values: Tensor) -> None:
        """Replace `values` by those of rank 0, in place."""
        if self.world_size > 1:
            dist.broadcast(values, src=0)

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """Return the tensors of all workers, of equal shape and dtype, by rank."""
        if self.world_size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(gathered, values)
        return gathered

    def all_gather_object(self, value: Any, group: Group = None) -> list[Any]:
        """Return the picklable values of all workers, by rank.

        Raises RuntimeError if a worker is missing.
        """
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def new_gloo_group(self, timeout_seconds: float) -> Group:
        """Return a gloo group of all workers, for collectives next to training.

        Returns None for one worker. A missing worker is detected within the timeout of the default group, not
        of the new one.
        """
        if self.world_size == 1:
            return None
        dist.barrier()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert isinstance(group, dist.ProcessGroup)  # every worker is a member
        return group
