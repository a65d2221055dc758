"""Connections of the layer's own, one for each kind and length of vector, where the backend is gloo.

gloo ends a process (std::terminate) that receives more bytes than it waits for. So if a rank skipped a layer, the next
one, of another width, would take ranks down without a word of which layer it was; and a collective of somebody else,
DistributedDataParallel's say, would be paired with a layer's if it were as long. In a lane nothing but equally long
vectors of the layers meet, and the stamp that they carry tells whether they are of the same call. Ranks that use
different lanes wait for each other, and the time limit ends that.

A lane costs about 10 ms when it is first used, one thread, and W - 1 open connections: a network whose layers have 30
different widths uses some 1,000 of them on 34 ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.timeout import run_with_timeout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_lanes: WeakKeyDictionary[ProcessGroup, dict[tuple[str, int], Any]] = WeakKeyDictionary()


def channel_for(
    group: ProcessGroup, kind: str, vector: Tensor, remaining: Callable[[], float], on_opening: Callable[[], None]
) -> Any:
    """Return what to issue a collective of a group on: its lane, or the group itself if its backend needs none.

    Args:
        group: the ranks.
        kind: of collective.
        vector: what each rank sends.
        remaining: tells the seconds that are left to wait for the other ranks, where the lane has to be opened first.
        on_opening: called before that.

    Raises:
        RuntimeError, TimeoutError: other ranks did not open the lane in time.
    """
    gloo = getattr(dist, "ProcessGroupGloo", None)
    backend: Any = group._get_backend(vector.device)
    # Under TORCH_DISTRIBUTED_DEBUG=DETAIL this is another class, which compares the calls before it issues them.
    if gloo is None or not isinstance(backend, gloo):
        return group
    lanes = _lanes.setdefault(group, {})
    key = (kind, vector.numel())
    if key not in lanes:
        on_opening()
        prefix = f"syncbn/{group.group_name}/{kind}/{vector.numel()}"
        store = torch._C._distributed_c10d.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        options = gloo._Options()
        options._devices = backend.options._devices  # the interface that was chosen, and the thread that serves it
        options._timeout = timedelta(seconds=remaining())
        options._threads = 1  # a layer waits for its collective before it issues another
        # gloo's own limit holds for each rank that it connects to, one after the other.
        lanes[key] = run_with_timeout(remaining(), lambda: gloo(store, group.rank(), group.size(), options))
    return lanes[key]
