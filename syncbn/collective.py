"""The only calls of torch.distributed: one vector in, one collective, what all ranks sent out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import GroupError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_size(process_group: ProcessGroup | None) -> int:
    """Count the ranks that synchronise with this one; no collective.

    Args:
        process_group: the group, or None for all ranks.

    Returns:
        The group's size; 1 if no process group was initialised, as a rank alone has nobody to synchronise with.

    Raises:
        GroupError: this rank is not in the group, or a group was given while torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise GroupError("a process group was given, but torch.distributed is not initialised in this process")
        return 1
    if dist.get_rank(process_group) < 0:
        raise GroupError(
            f"rank {dist.get_rank()} is not in the process group it was given; "
            "give each rank a group that it belongs to, or None for all ranks"
        )
    return dist.get_world_size(process_group)


def sum_over_ranks(vector: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Add the ranks' vectors: one all_reduce, whose cost per rank hardly depends on the number of ranks.

    Every rank receives the same bits, because the backends reduce each element once and hand the result round.

    Args:
        vector: shape (K,), alike in dtype on every rank; left as it is.
        process_group: the group, or None for all ranks.
    """
    total = vector.clone()
    dist.all_reduce(total, group=process_group)
    return total


def gather_from_ranks(vector: Tensor, process_group: ProcessGroup | None) -> tuple[Tensor, ...]:
    """Collect the ranks' vectors in the order of their ranks: one all_gather; nothing is rounded on the way.

    Args:
        vector: shape (K,), alike in dtype on every rank; left as it is.
        process_group: the group, or None for all ranks.
    """
    parts = torch.empty(dist.get_world_size(process_group), vector.numel(), dtype=vector.dtype, device=vector.device)
    dist.all_gather(list(parts.unbind()), vector, group=process_group)
    return parts.unbind()
