"""Identity of a layer's collectives: name, group, timeout, sequence number."""

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
    """Identity of one collective: layer, phase and sequence number. Ranks compare it."""

    site: LayerCollectives
    phase: str
    number: int

    def __str__(self) -> str:
        return f"{self.site.name}, {self.phase}, call {self.number}"


@dataclass(frozen=True, eq=False)
class RecomputeCache:
    """Statistics of one forward pass, kept so that a recomputation under activation checkpointing can reuse them."""

    number: int
    dtype: torch.dtype
    count: int
    sums: tuple[Tensor, ...]
    statistics: BatchStats

    def distance(self, x: Tensor, sums: tuple[Tensor, ...]) -> float | None:
        """Return the distance between the sums of `x` and those of this pass, or None if they are of different values."""
        channels, count = x.shape[1], x.numel() // x.shape[1]
        if (x.dtype, x.device, channels, count) != (self.dtype, self.sums[0].device, len(self.sums[0]), self.count):
            return None
        # The dtype of the sums is float32 or float64, depending on that of the data.
        own, others = (torch.stack(vectors).to(torch.float64) / max(count, 1) for vectors in (self.sums, sums))
        if not torch.allclose(own, others, rtol=1e-4, atol=1e-6, equal_nan=True):
            return None
        return (own - others).abs().nan_to_num().sum().item()


@dataclass(frozen=True)
class PickledGroup:
    """The global ranks of a process group that was pickled with its layer."""

    ranks: tuple[int, ...]


class LayerCollectives:
    """State of a layer's collectives.

    A custom operator accepts only numbers and tensors, so it receives `key`, by which `LayerCollectives.of` finds this object
    while the layer exists. The key is a tensor, since the compiler specialises a graph for each number.
    """

    _keys = itertools.count()
    _sites: ClassVar[WeakValueDictionary[int, LayerCollectives]] = WeakValueDictionary()

    def __init__(self, name: str, process_group: ProcessGroup | None = None) -> None:
        self.name = name
        self.group: ProcessGroup | PickledGroup | None = process_group
        self.timeout_seconds = float(os.environ.get(TIMEOUT_VARIABLE, "300"))
        self.share_wanted = False
        self.ranks = 1
        """Ranks of the newest forward pass; compiled backward passes have no other record of it."""
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
        """Return the object with this key."""
        return cls._sites[int(key)]

    @property
    def process_group(self) -> ProcessGroup | None:
        """Process group, or None for all ranks.

        Raises:
            GroupError: the layer was pickled with a group, and this process has no group of the same ranks.
        """
        if isinstance(self.group, PickledGroup):
            self.group = _find_group(self.group.ranks)
        return self.group

    def next_call(self, phase: str) -> CollectiveId:
        """Return the identity of the next collective of a phase."""
        number = self._counts[phase] = self._counts.get(phase, 0) + 1
        return CollectiveId(self, phase, number)

    def store(self, x: Tensor, sums: tuple[Tensor, ...], statistics: BatchStats, keep: bool) -> None:
        """Store the statistics of a forward pass for a recomputation under activation checkpointing.

        The entry lives as long as the autograd graph, which holds it. Where no graph is recorded, as in the first pass of a
        reentrant checkpoint, `keep` stores the newest `KEPT_RECORDS` entries here.
        """
        self.newest = RecomputeCache(next(self._numbers), x.dtype, x.numel() // x.shape[1], sums, statistics)
        self._live.add(self.newest)
        if keep:
            self._kept.append(self.newest)

    def lookup(self, x: Tensor, sums: tuple[Tensor, ...]) -> BatchStats | None:
        """Return the statistics of the forward pass that is being recomputed, or None outside a recomputation.

        A layer is not notified of a recomputation. But a recomputation runs inside a backward pass, and its sums equal those
        of the first pass, up to the last digits if kernels are not deterministic. If several passes match, the newest one
        that has not been recomputed is returned, since backward runs from the last pass to the first.
        """
        # -1 outside a backward pass of this thread.
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
        # A process group is a handle of this process's connections: the copy shares it and has its own sequence numbers.
        copied = self.__class__.__new__(self.__class__)
        copied.__setstate__({"group": self.group, **self._settings()})
        return copied


def _find_group(ranks: tuple[int, ...]) -> ProcessGroup | None:
    """Return this process's group of these ranks, or None if they are all ranks."""
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
    """Numbers layers in construction order, starting at 1 for each default process group."""

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
