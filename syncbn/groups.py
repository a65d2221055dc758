"""Process groups of a given size, for statistics over part of the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch.distributed as dist

from syncbn.errors import GroupError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def new_sync_groups(size: int) -> ProcessGroup | None:
    """Divide all ranks into groups of consecutive ranks; return this rank's group.

    The groups are ranks 0 to size - 1, size to 2·size - 1, and so on. Statistics over part of a large batch
    regularise like those of small batches. Ranks of one machine are consecutive, so groups of their number
    keep collectives inside a machine.

    Collectives: torch.distributed.new_group on all ranks; none if there is one group of all ranks.

    Args:
        size: ranks per group; must divide the number of ranks.

    Returns:
        The group, or None (all ranks) if `size` is the number of ranks.

    Raises:
        GroupError: `size` does not divide the number of ranks.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", section 4 (ghost batch
    normalisation).
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size < 1 or world_size % size:
        raise GroupError(f"size: must divide the number of ranks, {world_size} (got {size})")
    if size == world_size:
        return None
    firsts = range(0, world_size, size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    return cast("ProcessGroup", groups[dist.get_rank() // size])
