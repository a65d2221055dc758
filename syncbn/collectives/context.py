"""Identity of a layer's collectives: name, group, timeout, sequence number."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.handle import make_handle
from syncbn.errors import GroupError
from syncbn.kernels.statistics import BatchStats, LocalStats

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
    group_reference: ref[ProcessGroup]
    """Process group, which a call that is still observed must not keep alive."""

    @property
    def group(self) -> ProcessGroup:
        """Process group of the call.

        Raises:
            GroupError: it is gone.
        """
        group = self.group_reference()
        if group is None:
            raise GroupError(f"layer {self.site.name!r}: the process group of call {self.number} is gone")
        return group

    def __str__(self) -> str:
        return f"{self.site.name}, {self.phase}, call {self.number}"

    @functools.cached_property
    def stamp(self) -> int:
        """Hash of the identity, from 2^39 to 2^40 - 1.

        The sum over 8,192 ranks is exact in float64.
        """
        digest = hashlib.blake2b(str(self).encode(), digest_size=5).digest()
        return int.from_bytes(digest) | 1 << 39


@dataclass(frozen=True, eq=False)
class RecomputeCache:
    """Statistics of one forward pass, for its recomputation.

    Activation checkpointing recomputes forward passes, which must not exchange statistics again.
    """

    number: int
    dtype: torch.dtype
    local: LocalStats
    statistics: BatchStats

    def distance(self, x: Tensor, local: LocalStats) -> float | None:
        """Return the distance between statistics of this rank: of `x` and of this pass.

        Returns None if they are of different values.
        """
        mine = self.local.first
        if (x.dtype, x.device, x.shape[1], local.count) != (
            self.dtype,
            mine.device,
            len(mine),
            self.local.count,
        ):
            return None
        own, others = self.local.per_value(), local.per_value()
        if not torch.allclose(own, others, rtol=1e-4, atol=1e-6, equal_nan=True):
            return None
        return (own - others).abs().nan_to_num().sum().item()


@dataclass(frozen=True)
class PickledGroup:
    """The global ranks of a process group that was pickled with its layer."""

    ranks: tuple[int, ...]


class LayerCollectives:
    """State of a layer's collectives."""

    def __init__(self, name: str, process_group: ProcessGroup | None = None) -> None:
        self._name = name
        self.group: ProcessGroup | PickledGroup | None = process_group
        self.timeout_seconds = float(os.environ.get(TIMEOUT_VARIABLE, "300"))
        self.share_wanted = False
        self._begin()

    def _begin(self) -> None:
        self.handle = make_handle(self)
        self._counts: dict[str, int] = {}
        self._copies = itertools.count(1)
        self._group: ref[ProcessGroup] | None = None
        self._copy_numbers: Iterator[int] | None = None
        self._numbers = itertools.count()
        self._live: WeakSet[RecomputeCache] = WeakSet()
        self._recalled: WeakSet[RecomputeCache] = WeakSet()
        self.newest: RecomputeCache | None = None
        self._kept: deque[RecomputeCache] = deque(maxlen=KEPT_RECORDS)

    @property
    def process_group(self) -> ProcessGroup | None:
        """Process group, or None for all ranks.

        Raises:
            GroupError: the layer was pickled with a group, and this process has no group of the same ranks.
        """
        if isinstance(self.group, PickledGroup):
            self.group = _find_group(self.group.ranks)
        return self.group

    @property
    def name(self) -> str:
        """Name of the layer. A copy that has not been synchronised has no number yet."""
        return self._name if self._copy_numbers is None else f"{self._name}, copy"

    @name.setter
    def name(self, name: str) -> None:
        self._name, self._copy_numbers = name, None

    @property
    def last_group(self) -> ref[ProcessGroup] | None:
        """Process group of the newest forward pass, or None if that was over one rank."""
        return self._group

    def enter(self, group: ProcessGroup | None, *, is_initialised: bool) -> None:
        """Note the process group of a forward pass; a new one counts calls from 1.

        Args:
            group: group of the pass; None if this process is alone in it.
            is_initialised: whether torch.distributed is initialised.

        Raises:
            GroupError: the layer was synchronised before, and torch.distributed is gone.
        """
        if group is None:
            if self._group is not None and not is_initialised:
                raise GroupError(
                    f"layer {self.name!r}: its process group is gone, and this process would compute its "
                    "statistics alone; initialise torch.distributed, use evaluation mode, or call "
                    "revert_sync_batchnorm"
                )
            self._group = None
            return
        if self._copy_numbers is not None:
            self.name = f"{self.name} {next(self._copy_numbers)}"
        if self._group is None or self._group() is not group:
            self._group = ref(group)
            self._counts = {}

    def next_call(self, phase: str, group: ProcessGroup) -> CollectiveId:
        """Return the identity of the next collective of a phase."""
        number = self._counts[phase] = self._counts.get(phase, 0) + 1
        return CollectiveId(self, phase, number, ref(group))

    def store(self, x: Tensor, local: LocalStats, statistics: BatchStats, keep: bool) -> None:
        """Store the statistics of a forward pass for its recomputation.

        The entry lives as long as the autograd graph, which holds it. Where no graph is recorded, as in the
        first pass of a reentrant checkpoint, `keep` stores the newest `KEPT_RECORDS` entries here.
        """
        self.newest = RecomputeCache(next(self._numbers), x.dtype, local, statistics)
        self._live.add(self.newest)
        if keep:
            self._kept.append(self.newest)

    def lookup(self, x: Tensor, local: LocalStats) -> BatchStats | None:
        """Return the statistics of the forward pass that is being recomputed.

        Returns None outside a recomputation. A layer is not notified of a recomputation. But a recomputation
        runs inside a backward pass, and its statistics equal those of the first pass, up to the last digits
        if kernels are not deterministic. If several passes match, the newest one that has not been recomputed
        is returned, since backward runs from the last pass to the first.
        """
        # -1 outside a backward pass of this thread.
        if torch._C._current_graph_task_id() == -1:
            return None
        distances = [(record.distance(x, local), record) for record in self._live]
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
                raise GroupError(
                    f"layer {self.name!r}: its process group was destroyed; set another one"
                ) from error
        return {"group": group, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "timeout_seconds", "share_wanted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["name"]
        self.__dict__.update({key: value for key, value in state.items() if key != "name"})
        self._begin()
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCollectives:
        # A process group is a handle of this process's connections: the copy shares it and has its own
        # sequence numbers. Its own name separates it from the original, as in a teacher and its student. It
        # is counted when it is synchronised first: ranks may have other copies that they only evaluate.
        copied = self.__class__.__new__(self.__class__)
        copied.__setstate__({"group": self.group, **self._settings()})
        copied._copy_numbers, copied._group = self._copies, self._group
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
        f"the layer was pickled with a process group of ranks {list(ranks)}, and this process is not in such "
        "a group; create it by torch.distributed.new_group on all ranks, or set the layer's process_group"
    )


class _Numbering:
    """Numbering of layers in construction order, from 1 per default process group."""

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
