"""The only calls of torch.distributed: one vector in, one collective, what all ranks sent out.

Two numbers ride at the front of every vector, 16 bytes: a stamp of the layer's name, the phase and the call's number. Ranks
that are in the same call stamp alike, so the sum of all stamps is W times the own one. If it is not, torch.distributed
has paired two different calls, which it would do without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.context import CollectiveId, LayerCollectives
from syncbn.collectives.gloo import channel_for
from syncbn.collectives.timeout import run_with_timeout
from syncbn.collectives.watchdog import watch
from syncbn.errors import DesyncError, GroupError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SPIN_SECONDS = 0.002
"""How long a rank lets other threads run before it sleeps until its collective is done."""
GRACE_SECONDS = 1.0
"""How long a rank waits before it tells the others, through the store, where it is; so a good call tells nobody."""
ENQUIRY_SECONDS = 1.0
"""How long a rank whose call failed waits for the others to tell where they are."""
_STORE_ERRORS = (RuntimeError, TimeoutError, ValueError)
"""The store has gone with the rank that held it, or that rank has stopped, or the process group was destroyed from another
thread, as launchers do when a rank dies (ValueError): then there is nobody to tell or to ask."""


def group_size(process_group: ProcessGroup | None) -> int:
    """Count the ranks that synchronise with this one; no collective.

    Args:
        process_group: the group, or None for all ranks.

    Returns:
        The group's size; 1 if no process group was initialised, as a rank alone has nobody to synchronise with.

    Raises:
        GroupError: this rank is not in the group, the group was destroyed, or a group was given while torch.distributed is not
            initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise GroupError("a process group was given, but torch.distributed is not initialised in this process")
        return 1
    if process_group is None:
        return int(dist.distributed_c10d._get_default_group().size())
    try:
        rank = dist.get_rank(process_group)
    except ValueError as error:  # torch does not know the group any more
        raise GroupError(f"the process group was destroyed; set another one ({error})") from error
    if rank < 0:
        raise GroupError(
            f"rank {dist.get_rank()} is not in the process group it was given; "
            "give each rank a group that it belongs to, or None for all ranks"
        )
    return dist.get_world_size(process_group)


def sum_over_ranks(
    numbers: Sequence[float], parts: Sequence[Tensor], site: LayerCollectives, phase: str, ranks: int | None = None
) -> tuple[Sequence[Tensor | float], Tensor]:
    """Add the ranks' vectors: one all_reduce, whose cost per rank hardly depends on the number of ranks.

    Every rank receives the same bits, because the backends reduce each element once and hand the result round. A rank
    alone gets its own vector back and issues no collective.

    Args:
        numbers: what goes ahead of the parts.
        parts: vectors of any floating dtype, sent as one, of K elements together with the numbers, in float64, and two
            more for the stamp.
        site: where the call is issued from, on all ranks of its group.
        phase: which of its calls.
        ranks: number of ranks that the call must be over, where that is known from an earlier one.

    Returns:
        The sums of the numbers: as numbers, or as tensors if they are on a device that the host would have to wait for;
        and the sum of the parts, float64.

    Raises:
        DesyncError: other ranks are in another call, or not in any within the time limit.
        GroupError: the group has another number of ranks than `ranks`, as after destroy_process_group.
    """
    size = group_size(site.process_group)
    if ranks is not None and size != ranks:
        raise GroupError(
            f"layer {site.name!r}: forward was over {ranks} ranks, but {phase} is over {size}; "
            "keep the process group until backward is done"
        )
    if size == 1:
        return list(numbers), torch.cat([part.to(torch.float64) for part in parts])
    call = site.next_call(phase)
    group = _group(call)
    stamp = _stamp(call)
    vector = torch.cat([_to_device([*stamp, *numbers], parts[0]), *parts])
    options = dist.AllreduceOptions()
    _await(lambda lane: lane.allreduce([vector], options), "sum", options, call, vector)
    ahead = 2 + len(numbers)
    summed = _check(vector[:ahead], [group.size() * number for number in stamp], call)
    return summed, vector[ahead:]


def gather_from_ranks(numbers: Sequence[float], parts: Sequence[Tensor], site: LayerCollectives, phase: str) -> Tensor:
    """Collect the ranks' vectors in the order of their ranks: one all_gather; nothing is rounded on the way.

    Args and errors as in `sum_over_ranks`.

    Returns:
        Shape (W, K).
    """
    if group_size(site.process_group) == 1:
        return torch.cat([_to_device(numbers, parts[0]), *parts]).unsqueeze(0)
    call = site.next_call(phase)
    group = _group(call)
    stamp = _stamp(call)
    vector = torch.cat([_to_device([*stamp, *numbers], parts[0]), *parts])
    gathered = vector.new_empty(group.size(), vector.numel())
    options = torch._C._distributed_c10d.AllgatherOptions()
    _await(lambda lane: lane.allgather([list(gathered.unbind())], [vector], options), "gather", options, call, vector)
    _check(gathered[:, :2].sum(0), [group.size() * number for number in stamp], call)
    return gathered[:, 2:]


def _group(call: CollectiveId) -> ProcessGroup:
    return call.site.process_group or dist.distributed_c10d._get_default_group()


def _stamp(call: CollectiveId) -> list[float]:
    """Hash a call into two integers below 2^40, whose sum over 8,192 ranks float64 still counts exactly."""
    digest = hashlib.blake2b(str(call).encode(), digest_size=10).digest()
    return [float(int.from_bytes(digest[:5])), float(int.from_bytes(digest[5:]))]


def _to_device(numbers: Sequence[float], beside: Tensor) -> Tensor:
    """Make a vector of numbers; from pinned memory, as the host would otherwise wait for the device to take it."""
    vector = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=beside.is_cuda)
    return vector.to(beside.device, non_blocking=True) if beside.is_cuda else vector


def _is_queued(call: CollectiveId, tensor: Tensor) -> bool:
    """Tell whether the collective runs on the device's stream, where the host does not wait for it."""
    return tensor.is_cuda and dist.get_backend(call.site.process_group) != "gloo"


def _await(begin: Callable[[Any], Any], kind: str, options: Any, call: CollectiveId, vector: Tensor) -> None:
    """Issue a collective and wait for it, at most as long as the call's layer allows."""
    limit = call.site.timeout_seconds
    started = time.monotonic()
    group = _group(call)
    # The backend gives up too, a moment later: or its thread would go on waiting for the rank that does not come.
    options.timeout = timedelta(seconds=limit + GRACE_SECONDS)
    if _is_queued(call, vector):
        watch.raise_failure()
        begin(group).wait()  # makes the stream wait, and not the host
        return
    told = False

    def tell() -> None:
        nonlocal told
        told = True
        _publish_position(call, str(call))

    def remaining() -> float:
        return max(0.001, limit - (time.monotonic() - started))

    try:
        work = begin(channel_for(group, kind, vector, remaining, tell))
        _spin(work)
        patience = min(GRACE_SECONDS, remaining() / 2)
        asleep = time.monotonic()
        try:
            work.wait(timedelta(seconds=patience))
        except RuntimeError:
            if time.monotonic() - asleep < patience:
                raise
            tell()
            work.wait(timedelta(seconds=remaining()))
    except (RuntimeError, TimeoutError) as error:
        seconds = time.monotonic() - started
        how = f"not complete after {seconds:.1f} s" if seconds >= limit else f"broken after {seconds:.1f} s ({error})"
        raise _desync(call, how) from error
    if told:
        _publish_position(call, "")


def _spin(work: Any) -> None:
    """Offer the core to other threads for a moment, rather than sleep at once: who sleeps is woken late, on a cold core."""
    give_way = getattr(os, "sched_yield", lambda: time.sleep(0))
    end = time.monotonic() + SPIN_SECONDS
    while not work.is_completed() and time.monotonic() < end:
        give_way()


def _check(ahead: Tensor, expected: list[float], call: CollectiveId) -> Sequence[Tensor | float]:
    """Compare the stamps that lead a sum with those expected; return what follows them."""
    if _is_queued(call, ahead):
        watch.add(call, ahead[:2], expected, _desync, _group(call).abort)
        return ahead[2:].unbind()
    numbers: list[float] = ahead.tolist()
    if numbers[:2] != expected:
        raise _desync(call, "paired with another call")
    return numbers[2:]


def _desync(call: CollectiveId, how: str) -> DesyncError:
    """Ask the other ranks where they are, and say who is elsewhere."""
    try:
        own_rank, ranks = dist.get_rank(), dist.get_process_group_ranks(_group(call))
    except ValueError:
        message = f"layer {call.site.name!r}, {call.phase}, call {call.number}: the collective is {how}; the process group is gone"
        return DesyncError(message, call.site.name, call.phase, call.number, ())
    places = _query_peers(call, own_rank, ranks)
    missing = tuple(rank for rank in ranks if places.get(rank) != str(call))
    message = (
        f"rank {own_rank} in layer {call.site.name!r}, {call.phase}, call {call.number}: the collective is {how}. "
        f"Ranks not in this call: {list(missing)}. "
        + "".join(f"Rank {rank} is in {places[rank]}. " for rank in missing if places.get(rank))
        + "Every rank must run the same layers in the same order and equally often, forward and backward; ranks without "
        "data pass an empty batch. Layers are told apart by their layer_name."
    )
    return DesyncError(message, call.site.name, call.phase, call.number, missing)


def _query_peers(call: CollectiveId, own_rank: int, ranks: list[int]) -> dict[int, str]:
    """Tell where this rank is and read where the others are, waiting a moment for those who are about to tell."""
    places = {own_rank: str(call)}
    deadline = time.monotonic() + ENQUIRY_SECONDS

    def ask() -> None:
        _store().set(_store_key(call, own_rank), str(call))
        while len(places) < len(ranks) and time.monotonic() < deadline:
            for rank in ranks:
                if _store().check([_store_key(call, rank)]) and (
                    place := _store().get(_store_key(call, rank)).decode()
                ):
                    places[rank] = place
            time.sleep(0.02)

    with contextlib.suppress(*_STORE_ERRORS):
        run_with_timeout(ENQUIRY_SECONDS + 0.5, ask)
    return dict(places)


def _publish_position(call: CollectiveId, place: str) -> None:
    with contextlib.suppress(*_STORE_ERRORS):
        run_with_timeout(ENQUIRY_SECONDS, lambda: _store().set(_store_key(call, dist.get_rank()), place))


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _store_key(call: CollectiveId, rank: int) -> str:
    return f"syncbn/{_group(call).group_name}/{rank}"
