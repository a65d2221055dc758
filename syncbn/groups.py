"""Process groups of a given size, for statistics over fewer ranks than there are: ghost batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch.distributed as dist

from syncbn.errors import GroupError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def new_sync_groups(size: int) -> ProcessGroup | None:
    """Divide all ranks into groups of neighbours, and return this rank's: ranks 0 to size - 1, size to 2·size - 1, ...

    Statistics over part of a large batch regularise as small batches do. Ranks of one machine are neighbours, so that a
    group of a machine's ranks also keeps the collectives on it.

    Collectives: those of torch.distributed.new_group, by all ranks; none if the group is that of all ranks.

    Args:
        size: ranks in a group; it divides the number of ranks.

    Returns:
        The group, or None, which means all ranks, if size is their number.

    Raises:
        GroupError: size does not divide the number of ranks.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", section 4 (ghost batch normalisation).
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size < 1 or world_size % size:
        raise GroupError(f"groups of {size} ranks were asked for, but there are {world_size} ranks; taken is a divisor")
    if size == world_size:
        return None
    firsts = range(0, world_size, size)
    groups = [dist.new_group(list(range(first, first + size))) for first in firsts]
    return cast("ProcessGroup", groups[dist.get_rank() // size])
