"""All calls of torch.distributed: sum or gather one vector over the ranks.

Each vector begins with a stamp of two numbers (16 bytes): a hash of layer name, phase and sequence number. The stamps of ranks
in the same call are equal, so their sum is W times the own stamp. Any other sum means that different calls were paired, which
torch.distributed does not detect.
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
"""Time for which a rank yields its core before it sleeps until its collective completes."""
GRACE_SECONDS = 1.0
"""Wait before a rank publishes its position in the store. A call that completes sooner publishes nothing."""
ENQUIRY_SECONDS = 1.0
"""Time for which a rank whose call failed waits for the positions of the others."""
_STORE_ERRORS = (RuntimeError, TimeoutError, ValueError)
"""Errors of a store that is no longer there: its rank has ended or stopped, or another thread has destroyed the process group,
as launchers do when a rank ends (ValueError)."""


def group_size(process_group: ProcessGroup | None) -> int:
    """Return the number of ranks in a process group, without a collective.

    Args:
        process_group: the group, or None for all ranks.

    Returns:
        Size of the group; 1 if torch.distributed is not initialised.

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
    except ValueError as error:  # torch no longer knows the group
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
    """Sum the vectors of all ranks by one all_reduce.

    Every rank receives the same bits, since the backends reduce each element once and distribute the result. With one rank no
    collective is issued.

    Args:
        numbers: prefix of the vector.
        parts: vectors of any floating dtype, concatenated with the numbers to K elements in float64, plus two for the stamp.
        site: identity of the layer, on all ranks of its group.
        phase: "forward" or "backward".
        ranks: expected size of the group, if an earlier call has determined it.

    Returns:
        Sums of the numbers, as Python numbers, or as tensors where the host would have to wait for a device; and the sum of the
        parts, float64.

    Raises:
        DesyncError: other ranks are in another call, or did not arrive within the timeout.
        GroupError: the size of the group is not `ranks`, for example after destroy_process_group.
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
    _await(lambda channel: channel.allreduce([vector], options), "sum", options, call, vector)
    ahead = 2 + len(numbers)
    summed = _check(vector[:ahead], [group.size() * number for number in stamp], call)
    return summed, vector[ahead:]


def gather_from_ranks(numbers: Sequence[float], parts: Sequence[Tensor], site: LayerCollectives, phase: str) -> Tensor:
    """Gather the vectors of all ranks, without rounding, by one all_gather.

    Args and errors as in `sum_over_ranks`.

    Returns:
        Shape (W, K), in rank order.
    """
    if group_size(site.process_group) == 1:
        return torch.cat([_to_device(numbers, parts[0]), *parts]).unsqueeze(0)
    call = site.next_call(phase)
    group = _group(call)
    stamp = _stamp(call)
    vector = torch.cat([_to_device([*stamp, *numbers], parts[0]), *parts])
    gathered = vector.new_empty(group.size(), vector.numel())
    options = torch._C._distributed_c10d.AllgatherOptions()
    _await(
        lambda channel: channel.allgather([list(gathered.unbind())], [vector], options), "gather", options, call, vector
    )
    _check(gathered[:, :2].sum(0), [group.size() * number for number in stamp], call)
    return gathered[:, 2:]


def _group(call: CollectiveId) -> ProcessGroup:
    return call.site.process_group or dist.distributed_c10d._get_default_group()


def _stamp(call: CollectiveId) -> list[float]:
    """Hash a call to two integers below 2^40, whose sum over 8,192 ranks is exact in float64."""
    digest = hashlib.blake2b(str(call).encode(), digest_size=10).digest()
    return [float(int.from_bytes(digest[:5])), float(int.from_bytes(digest[5:]))]


def _to_device(numbers: Sequence[float], beside: Tensor) -> Tensor:
    """Return numbers as a vector on the device of a tensor, through pinned memory so that the host does not wait."""
    vector = torch.tensor(numbers, dtype=torch.float64, device="cpu", pin_memory=beside.is_cuda)
    return vector.to(beside.device, non_blocking=True) if beside.is_cuda else vector


def _is_queued(call: CollectiveId, tensor: Tensor) -> bool:
    """Return whether a collective runs on the device's stream, so that the host does not wait for it."""
    return tensor.is_cuda and dist.get_backend(call.site.process_group) != "gloo"


def _await(begin: Callable[[Any], Any], kind: str, options: Any, call: CollectiveId, vector: Tensor) -> None:
    """Issue a collective and wait for it, up to the timeout of its layer."""
    limit = call.site.timeout_seconds
    started = time.monotonic()
    group = _group(call)
    # The backend times out a moment later; otherwise its thread would continue to wait for a missing rank.
    options.timeout = timedelta(seconds=limit + GRACE_SECONDS)
    if _is_queued(call, vector):
        watch.raise_failure()
        begin(group).wait()  # the stream waits, not the host
        return
    is_published = False

    def publish() -> None:
        nonlocal is_published
        is_published = True
        _publish_position(call, str(call))

    def remaining() -> float:
        return max(0.001, limit - (time.monotonic() - started))

    try:
        work = begin(channel_for(group, kind, vector, remaining, publish))
        _spin(work)
        patience = min(GRACE_SECONDS, remaining() / 2)
        asleep = time.monotonic()
        try:
            work.wait(timedelta(seconds=patience))
        except RuntimeError:
            if time.monotonic() - asleep < patience:
                raise
            publish()
            work.wait(timedelta(seconds=remaining()))
    except (RuntimeError, TimeoutError) as error:
        seconds = time.monotonic() - started
        how = f"not complete after {seconds:.1f} s" if seconds >= limit else f"broken after {seconds:.1f} s ({error})"
        raise _desync(call, how) from error
    if is_published:
        _publish_position(call, "")


def _spin(work: Any) -> None:
    """Yield the core for a moment before sleeping, since a sleeping thread is woken late and on a cold core."""
    give_way = getattr(os, "sched_yield", lambda: time.sleep(0))
    end = time.monotonic() + SPIN_SECONDS
    while not work.is_completed() and time.monotonic() < end:
        give_way()


def _check(ahead: Tensor, expected: list[float], call: CollectiveId) -> Sequence[Tensor | float]:
    """Compare the stamps at the front of a sum with the expected ones; return the numbers after them."""
    if _is_queued(call, ahead):
        watch.add(call, ahead[:2], expected, _desync, _group(call).abort)
        return ahead[2:].unbind()
    numbers: list[float] = ahead.tolist()
    if numbers[:2] != expected:
        raise _desync(call, "paired with another call")
    return numbers[2:]


def _desync(call: CollectiveId, how: str) -> DesyncError:
    """Return the error of a failed call, with the positions of the other ranks."""
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
        "data pass an empty batch. Layers are identified by layer_name."
    )
    return DesyncError(message, call.site.name, call.phase, call.number, missing)


def _query_peers(call: CollectiveId, own_rank: int, ranks: list[int]) -> dict[int, str]:
    """Publish the position of this rank, and read those of the others, waiting up to `ENQUIRY_SECONDS`."""
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
