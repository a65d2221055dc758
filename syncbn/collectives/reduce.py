"""Collectives of a pass: sum or gather one vector over the ranks.

Each vector begins with a stamp (8 bytes): a hash of layer name, phase and sequence number. The stamps of
ranks in the same call are equal, so their sum is W times the own stamp. Any other sum means that different
calls were paired, which torch.distributed does not detect.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
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
from syncbn.kernels.statistics import Check

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SPIN_SECONDS = 0.002
"""Time for which a rank yields its core before it sleeps until its collective completes."""
GRACE_SECONDS = 1.0
"""Wait before a rank publishes its position in the store. A call that completes sooner publishes nothing."""
ENQUIRY_SECONDS = 1.0
"""Time for which a rank whose call failed waits for the positions of the others."""
_STORE_ERRORS = (RuntimeError, TimeoutError, ValueError)
"""Errors of a store that is no longer there: its rank has ended or stopped, or another thread has destroyed
the process group, as launchers do when a rank ends (ValueError)."""


def group_size(process_group: ProcessGroup | None) -> int:
    """Return the number of ranks in a process group, without a collective.

    Args:
        process_group: the group, or None for all ranks.

    Returns:
        Size of the group; 1 if torch.distributed is not initialised.

    Raises:
        GroupError: this rank is not in the group, the group was destroyed, or a group was given while
            torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise GroupError(
                "a process group was given, but torch.distributed is not initialised in this process"
            )
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


def current_group(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """Return the process group to synchronise over.

    It is None if torch.distributed is not initialised.

    Args and errors as in `group_size`.
    """
    if process_group is None and dist.is_available() and dist.is_initialized():
        return dist.distributed_c10d._get_default_group()
    group_size(process_group)
    return process_group


def group_of_pass(site: LayerCollectives) -> ProcessGroup | None:
    """Return the group of a forward pass, or None if it is over one rank."""
    current = current_group(site.process_group)
    group = None if current is None or current.size() == 1 else current
    site.enter(group, is_initialised=current is not None)
    return group


def check_group(site: LayerCollectives, group: ProcessGroup | None) -> ProcessGroup:
    """Return the group of a forward pass if it is still the one to synchronise over.

    Raises:
        GroupError: the group was destroyed or re-created.
    """
    with contextlib.suppress(GroupError):
        if group is not None and current_group(site.process_group) is group:
            return group
    raise GroupError(
        f"layer {site.name!r}: the process group of the forward pass was destroyed or re-created; keep it "
        "until backward is done"
    )


def all_reduce(vector: Tensor, call: CollectiveId) -> Check | None:
    """Sum the vectors of all ranks in place.

    The first element is the stamp of the call. Every rank receives the same bits, since the backends reduce
    each element once and distribute the result.

    Returns:
        What to compare the stamp with on the device, if the collective was queued on a device stream;
        otherwise None, and the stamp has been compared.

    Raises:
        DesyncError: other ranks are in another call, or did not arrive within the timeout.
    """
    options = dist.AllreduceOptions()
    with _observed([call], vector) as checks:
        _await(lambda channel: channel.allreduce([vector], options), "sum", options, call, vector)
    if checks:
        return checks[0]
    _check(vector[:1], call)
    return None


def all_reduce_together(
    vectors: Sequence[Tensor], calls: Sequence[CollectiveId]
) -> list[tuple[Tensor, Check | None]]:
    """Sum the vectors of several calls over all ranks by one collective.

    Returns:
        The sum of each vector, and what to compare its stamp with, as in `all_reduce`.
    """
    together = torch.cat(list(vectors))
    options = dist.AllreduceOptions()
    with _observed(calls, together) as checks:
        _await(lambda channel: channel.allreduce([together], options), "sum", options, calls[0], together)
    parts = torch.split(together, [vector.numel() for vector in vectors])
    if checks:
        return list(zip(parts, checks, strict=True))
    for part, call in zip(parts, calls, strict=True):
        _check(part[:1], call)
    return [(part, None) for part in parts]


def all_gather(vector: Tensor, call: CollectiveId) -> tuple[Tensor, Check | None]:
    """Gather the vectors of all ranks, without rounding; shape (W, K), in rank order.

    Result and errors otherwise as in `all_reduce`; the sum of the stamps is what is compared.
    """
    gathered = vector.new_empty(call.group.size(), vector.numel())
    options = torch._C._distributed_c10d.AllgatherOptions()

    def begin(channel: Any) -> Any:
        if _is_queued(call, vector):  # NCCL would copy each of a list of outputs
            return channel._allgather_base(gathered.view(-1), vector, options)
        return channel.allgather([list(gathered.unbind())], [vector], options)

    with _observed([call], vector) as checks:
        _await(begin, "gather", options, call, vector)
    if checks:
        return gathered, checks[0]
    _check(gathered[:, 0], call)
    return gathered, None


@contextlib.contextmanager
def _observed(calls: Sequence[CollectiveId], vector: Tensor) -> Iterator[list[Check]]:
    """Observe calls before they are queued on a device stream; yield their checks.

    The device's numbers must exist before: creating them would wait for what is queued.
    """
    if not _is_queued(calls[0], vector):
        yield []
        return
    checks = [watch.follow(call, vector.device, call.group.size() * call.stamp, _desync) for call in calls]
    try:
        yield checks
    except BaseException:
        for check in checks:
            watch.forget(check, vector.device)
        raise


def _is_queued(call: CollectiveId, tensor: Tensor) -> bool:
    """Return whether a collective runs on the device's stream.

    Then the host does not wait for it.
    """
    return tensor.is_cuda and dist.get_backend(call.group) != "gloo"


def _await(begin: Callable[[Any], Any], kind: str, options: Any, call: CollectiveId, vector: Tensor) -> None:
    """Issue a collective and wait for it, up to the timeout of its layer."""
    limit = call.site.timeout_seconds
    started = time.monotonic()
    group = call.group
    # gloo times out a moment later; otherwise its thread would continue to wait for a missing rank. NCCL has
    # the timeout of the group.
    options.timeout = timedelta(seconds=limit + GRACE_SECONDS)
    if _is_queued(call, vector):
        if torch.cuda.is_current_stream_capturing():
            raise GroupError(
                f"layer {call.site.name!r}: a CUDA graph cannot capture synchronised statistics, since each "
                "call has another stamp; capture the evaluation mode, or a part of the model "
                "without the layer"
            )
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
        how = (
            f"not complete after {seconds:.1f} s"
            if seconds >= limit
            else f"broken after {seconds:.1f} s ({error})"
        )
        raise _desync(call, how) from error
    if is_published:
        _publish_position(call, "")


def _spin(work: Any) -> None:
    """Yield the core for a moment before sleeping.

    A sleeping thread is woken late and on a cold core.
    """
    give_way = getattr(os, "sched_yield", lambda: time.sleep(0))
    end = time.monotonic() + SPIN_SECONDS
    while not work.is_completed() and time.monotonic() < end:
        give_way()


def _check(stamps: Tensor, call: CollectiveId) -> None:
    """Compare the sum of stamps with the expected one.

    Raises:
        DesyncError: other ranks were in another call.
    """
    if sum(stamps.tolist()) != call.group.size() * call.stamp:
        raise _desync(call, "paired with another call")


def _desync(call: CollectiveId, how: str) -> DesyncError:
    """Return the error of a failed call, with the positions of the other ranks."""
    try:
        own_rank, ranks = dist.get_rank(), dist.get_process_group_ranks(call.group)
    except ValueError:
        where = f"layer {call.site.name!r}, {call.phase}, call {call.number}"
        message = f"{where}: the collective is {how}; the process group was destroyed"
        return DesyncError(message, call.site.name, call.phase, call.number, ())
    places = _query_peers(call, own_rank, ranks)
    missing = tuple(rank for rank in ranks if places.get(rank) != str(call))
    message = (
        f"rank {own_rank} in layer {call.site.name!r}, {call.phase}, call {call.number}: "
        f"the collective is {how}. Ranks not in this call: {list(missing)}. "
        + "".join(f"Rank {rank} is in {places[rank]}. " for rank in missing if places.get(rank))
        + "Every rank must run the same layers in the same order and equally often, forward and backward; "
        "ranks without data pass an empty batch. Layers are identified by layer_name."
    )
    return DesyncError(message, call.site.name, call.phase, call.number, missing)


def _query_peers(call: CollectiveId, own_rank: int, ranks: list[int]) -> dict[int, str]:
    """Publish the position of this rank, and read those of the others.

    Waits up to `ENQUIRY_SECONDS`.
    """
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
    return f"syncbn/{call.group.group_name}/{rank}"
