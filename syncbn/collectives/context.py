"""The place a collective is issued from: whose it is, over which ranks, with which time limit, and its how-manieth."""

from __future__ import annotations

import itertools
import operator
import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet, WeakValueDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.errors import GroupError
from syncbn.kernels.statistics import BatchStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT_VARIABLE = "SYNCBN_TIMEOUT_SECONDS"
KEPT_RECORDS = 16


@dataclass(frozen=True)
class CollectiveId:
    """One collective of one call site, as the ranks compare it."""

    site: LayerCollectives
    phase: str
    number: int

    def __str__(self) -> str:
        return f"{self.site.name}, {self.phase}, call {self.number}"


@dataclass(frozen=True, eq=False)
class RecomputeCache:
    """What a forward pass measured here and got from all ranks, for activation checkpointing to find again."""

    number: int
    dtype: torch.dtype
    count: int
    sums: tuple[Tensor, ...]
    statistics: BatchStats

    def distance(self, x: Tensor, sums: tuple[Tensor, ...]) -> float | None:
        """Return how far sums over a tensor's values are from these, or None if they are those of other values."""
        channels, count = x.shape[1], x.numel() // x.shape[1]
        if (x.dtype, x.device, channels, count) != (self.dtype, self.sums[0].device, len(self.sums[0]), self.count):
            return None
        # Sums are of float32 or float64 by the data.
        own, others = (torch.stack(vectors).to(torch.float64) / max(count, 1) for vectors in (self.sums, sums))
        if not torch.allclose(own, others, rtol=1e-4, atol=1e-6, equal_nan=True):
            return None
        return (own - others).abs().nan_to_num().sum().item()


@dataclass(frozen=True)
class PickledGroup:
    """The global ranks of a process group that was pickled with its layer."""

    ranks: tuple[int, ...]


class LayerCollectives:
    """What a layer's collectives need to know beside their tensors.

    A custom operator takes numbers and tensors alone, so it names its call site by `key`, and `LayerCollectives.of` finds it
    again as long as the layer lives. The key is a tensor, since the compiler makes a graph of its own for each number.
    """

    _keys = itertools.count()
    _sites: ClassVar[WeakValueDictionary[int, LayerCollectives]] = WeakValueDictionary()

    def __init__(self, name: str, process_group: ProcessGroup | None = None) -> None:
        self.name = name
        self.group: ProcessGroup | PickledGroup | None = process_group
        self.timeout_seconds = float(os.environ.get(TIMEOUT_VARIABLE, "300"))
        self.share_wanted = False
        self.ranks = 1
        """Of the newest forward pass, for backward passes that have no other memory of it (compiled ones)."""
        self._begin()

    def _begin(self) -> None:
        number = next(self._keys)
        self.key = torch.tensor(number, device="cpu")
        self._sites[number] = self
        self._counts: dict[str, int] = {}
        self._numbers = itertools.count()
        self._live: WeakSet[RecomputeCache] = WeakSet()
        self._recalled: WeakSet[RecomputeCache] = WeakSet()
        self.newest: RecomputeCache | None = None
        self._kept: deque[RecomputeCache] = deque(maxlen=KEPT_RECORDS)

    @classmethod
    def of(cls, key: Tensor) -> LayerCollectives:
        """Return the call site that has this key."""
        return cls._sites[int(key)]

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group, or None for all ranks.

        Raises:
            GroupError: the layer was pickled with a group, and this process has none of the same ranks.
        """
        if isinstance(self.group, PickledGroup):
            self.group = _find_group(self.group.ranks)
        return self.group

    def next_call(self, phase: str) -> CollectiveId:
        """Count one more collective of a phase."""
        number = self._counts[phase] = self._counts.get(phase, 0) + 1
        return CollectiveId(self, phase, number)

    def store(self, x: Tensor, sums: tuple[Tensor, ...], statistics: BatchStats, keep: bool) -> None:
        """Note what a forward pass got from all ranks, should activation checkpointing repeat it.

        The note lasts as long as the caller holds it, which is the autograd graph. Where no graph is recorded, as in
        the first pass of a reentrant checkpoint, `keep` has the call site hold the newest few itself.
        """
        self.newest = RecomputeCache(next(self._numbers), x.dtype, x.numel() // x.shape[1], sums, statistics)
        self._live.add(self.newest)
        if keep:
            self._kept.append(self.newest)

    def lookup(self, x: Tensor, sums: tuple[Tensor, ...]) -> BatchStats | None:
        """Return what the ranks exchanged when this rank last measured this, or None if it never did.

        Nobody tells a layer that it is being recomputed. But a recomputation runs inside a backward pass, and it
        measures what the first pass did, up to the last digits where kernels are not deterministic. Where this rank
        measured the same more than once, the others may not have: then it is the newest pass that was not recomputed
        yet, as backward goes from the last to the first.
        """
        # The graph task is the backward pass that this thread is in.
        if torch._C._current_graph_task_id() == -1:
            return None
        distances = [(record.distance(x, sums), record) for record in self._live]
        alike = [
            (distance, record in self._recalled, -record.number, record)
            for distance, record in distances
            if distance is not None
        ]
        if not alike:
            return None
        record = min(alike, key=operator.itemgetter(0, 1, 2))[3]
        self._recalled.add(record)
        if record in self._kept:
            self._kept.remove(record)
        return record.statistics

    def __getstate__(self) -> dict[str, Any]:
        group = self.group
        if group is not None and not isinstance(group, PickledGroup):
            try:
                group = PickledGroup(tuple(dist.get_process_group_ranks(group)))
            except (KeyError, ValueError) as error:
                raise GroupError(f"layer {self.name!r}: its process group was destroyed; set another one") from error
        return {"group": group, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "timeout_seconds", "share_wanted", "ranks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCollectives:
        # A process group is a handle on this process's connections: the copy shares it, and counts its own calls.
        copied = self.__class__.__new__(self.__class__)
        copied.__setstate__({"group": self.group, **self._settings()})
        return copied


def _find_group(ranks: tuple[int, ...]) -> ProcessGroup | None:
    """Return this process's group of these ranks, and None if they are all ranks."""
    if dist.is_initialized():
        if ranks == tuple(range(dist.get_world_size())):
            return None
        for group in dist.distributed_c10d._world.pg_map:
            if tuple(dist.get_process_group_ranks(group)) == ranks:
                return group
    raise GroupError(
        f"the layer was pickled with a process group of ranks {list(ranks)}, and this process is in no such group; "
        "make it by torch.distributed.new_group on all ranks, or set the layer's process_group"
    )


class _Numbering:
    """Numbers the layers in the order they are built, from one again whenever a default process group follows another."""

    def __init__(self) -> None:
        self._world: ref[Any] | None = None
        self._next = 1

    def __call__(self) -> int:
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if world is not None and (self._world is None or self._world() is not world):
            self._next = self._next if self._world is None else 1
            self._world = ref(world)
        number, self._next = self._next, self._next + 1
        return number


next_layer_number = _Numbering()
