"""Channels over gloo: connections per kind of collective and vector length.

gloo terminates a process (std::terminate) that receives more bytes than it expects. If a rank skipped a
layer, the next layer of another width would therefore end processes without naming a layer, and a collective
of other code, such as DistributedDataParallel, could be paired with one of a layer. A channel carries only
vectors of one length from layers, and their stamps show whether they belong to the same call. Ranks in
different channels wait for each other until the timeout.

The first use of a channel costs about 10 ms, one thread and W - 1 open connections. A network with 30
different layer widths uses about 1,000 connections on 34 ranks.
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

_channels: WeakKeyDictionary[ProcessGroup, dict[tuple[str, int], Any]] = WeakKeyDictionary()


def channel_for(
    group: ProcessGroup,
    kind: str,
    vector: Tensor,
    remaining: Callable[[], float],
    on_opening: Callable[[], None],
) -> Any:
    """Return the channel for a collective; the group itself if it is not gloo.

    Args:
        group: process group of the collective.
        kind: "sum" or "gather".
        vector: tensor that each rank sends.
        remaining: returns the seconds left for opening a channel.
        on_opening: called before a channel is opened.

    Raises RuntimeError or TimeoutError if other ranks did not open the channel in time.
    """
    gloo = getattr(dist, "ProcessGroupGloo", None)
    backend: Any = group._get_backend(vector.device)
    # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps the backend in another class, which itself compares calls.
    if gloo is None or not isinstance(backend, gloo):
        return group
    channels = _channels.setdefault(group, {})
    key = (kind, vector.numel())
    if key not in channels:
        on_opening()
        prefix = f"syncbn/{group.group_name}/{kind}/{vector.numel()}"
        store = torch._C._distributed_c10d.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        options = gloo._Options()
        options._devices = backend.options._devices  # network interface and its thread
        options._timeout = timedelta(seconds=remaining())
        options._threads = 1  # a layer issues one collective at a time
        # gloo's own timeout applies to each connection in turn, not to all of them together.
        channels[key] = run_with_timeout(
            remaining(), lambda: gloo(store, group.rank(), group.size(), options)
        )
    return channels[key]
