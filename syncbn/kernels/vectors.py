"""Vectors of a layer's collectives, packed and unpacked by operators of torch.

    forward    [stamp, n, Σx, Σx²], or [stamp, n, mean, M2] where vectors are gathered
    backward   [stamp, 0, Σdy, Σdy·x̂]

The stamp identifies the call. `syncbn.kernels.triton` has the same functions for GPUs.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from syncbn.kernels.statistics import HEAD, NEVER, BatchStats, Check, LocalStats, RunningStats, at_least_one
from syncbn.moments import Moments


def head(stamp: int, number: float, device: torch.device) -> Tensor:
    """Return [stamp, number], float64, without a copy from the host to a GPU."""
    if device.type == "cpu":
        return torch.frombuffer(array("d", (stamp, number)), dtype=torch.float64)  # faster than tensor()
    return torch.linspace(stamp, number, 2, dtype=torch.float64, device=device)  # its ends are exact


def rows(vector: Tensor, channels: int) -> Tensor:
    """View the two vectors of C elements behind the head, shape (2, C)."""
    return vector.as_strided((2, channels), (channels, 1), vector.storage_offset() + HEAD)


def pack_forward(
    local: LocalStats, channels: int, device: torch.device, stamp: int, *, gather: bool, share: bool
) -> Tensor:
    """Return the vector of the forward collective.

    Args:
        local: statistics of this rank.
        channels: C.
        device: device of the values.
        stamp: stamp of the call.
        gather: whether vectors will be gathered and not summed.
        share: whether to add M2 of this rank, which a gathered vector always has.
    """
    parts = [head(stamp, local.count, device), local.first, local.second]
    if share and not gather:
        variance = local.second
        if local.are_sums:
            n = max(local.count, 1)
            variance = local.second.to(torch.float64) / n - (local.first.to(torch.float64) / n).square()
        parts.append(variance * local.count)
    vector = torch.cat(parts)
    if not local.are_sums:
        first, second = vector[HEAD : HEAD + 2 * channels].view(2, channels).unbind()
        if gather:
            second.mul_(local.count)
        else:
            second.addcmul_(first, first)
            vector[HEAD : HEAD + 2 * channels].mul_(local.count)
    return vector


def unpack_forward(
    vector: Tensor,
    channels: int,
    accumulator: torch.dtype | None,
    eps: float,
    running: RunningStats | None,
    check: Check | None,
    *,
    share: bool,
) -> BatchStats:
    """Return the statistics over the ranks.

    From sums, mean = Σx / n and variance = Σx² / n - mean². The subtraction has an error of about
    2^-52·mean², below the resolution of float32 values. Gathered vectors are merged by `Moments.merge`.

    Args:
        vector: sum of the vectors of all ranks, shape (K,), which is overwritten; or the vectors, (W, K).
        channels: C.
        accumulator: dtype in which the GPU accumulates, for `BatchStats.rounded`; None for the CPU.
        eps: added to the variance in the inverse deviation.
        running: not used; the caller updates running statistics.
        check: what to compare the sum of stamps with, on the device.
        share: whether the vectors have M2 of each rank.
    """
    is_gathered = vector.dim() == 2
    if is_gathered:
        vector = _merge(vector, channels, share)
    count = vector[1] if accumulator else vector[:HEAD].tolist()[1]  # which dispatches less than item()
    moments = rows(vector, channels)
    mean, variance = moments.unbind()
    statistics = BatchStats(vector, moments, mean, variance, eps, count)
    if not is_gathered:
        moments.div_(at_least_one(count))
        # Rounding can make the variance of a constant channel negative, and its square root NaN.
        statistics.variance.addcmul_(statistics.mean, statistics.mean, value=-1).clamp_(min=0)
    note(vector, check)
    if accumulator is not None:
        statistics.rounded = vector.new_empty(2, channels, dtype=accumulator)
        statistics.rounded[0].copy_(statistics.mean)
        torch.rsqrt(statistics.variance + eps, out=statistics.rounded[1])
    return statistics


def _merge(vectors: Tensor, channels: int, share: bool) -> Tensor:
    """Return [stamps, n, mean, variance, Σᵢ M2ᵢ] of the vectors of all ranks."""
    merged = Moments.merge([Moments.unpack(part[1:]) for part in vectors])
    parts = [vectors[:, :1].sum(0), merged.count.view(1), merged.mean, merged.variance]
    return torch.cat([*parts, vectors[:, HEAD + channels :].sum(0)] if share else parts)


def pack_backward(
    sums: tuple[Tensor, Tensor] | None,
    moments: Tensor,
    rounded: Tensor,
    eps: float,
    stamp: int,
    gradients: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the vector of the backward collective on a GPU.

    It also writes this rank's gradients of weight and bias.

    Args:
        sums: Σdy and Σdy·(x - centre), shape (C,), with the centre `rounded[0]`; None without values.
        moments: statistics of the forward pass.
        rounded: the same in the accumulator dtype.
        eps: value added to the variance.
        stamp: stamp of the call.
        gradients: gradients of weight and bias, shape (C,), overwritten.
    """
    channels = rounded.shape[1]
    total, product = rounded.new_zeros(2, channels).unbind() if sums is None else sums
    vector = torch.cat([head(stamp, 0, moments.device), total, product])
    s, d = vector[HEAD:].view(2, channels).unbind()
    mean, variance = moments[HEAD : HEAD + 2 * channels].view(2, channels).unbind()
    if rounded.dtype != torch.float64:
        d.addcmul_(s, mean - rounded[0], value=-1)  # the centre is the rounded mean
    d.mul_((variance + eps).rsqrt_())
    torch._foreach_copy_(gradients, (d, s))
    return vector


def unpack_backward(
    vector: Tensor, moments: Tensor, rounded: Tensor, eps: float, check: Check | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the means of dy and of dy·(x - mean) over all ranks, and the weight.

    The means have shape (2, C); all have the accumulator dtype. The vector is overwritten; the other
    arguments are as for `pack_backward`.
    """
    channels = rounded.shape[1]
    means = vector[HEAD:].view(2, channels).div_(moments[1].clamp(min=1))
    note(vector, check)
    means[1].mul_((moments[HEAD + channels : HEAD + 2 * channels] + eps).sqrt_())
    return means.to(rounded.dtype), None if weight is None else weight.to(rounded.dtype)


def note(vector: Tensor, check: Check | None) -> None:
    """Compare a summed stamp on the device, and note the call as complete."""
    if check is not None:
        is_mispaired = torch.ne(vector[0], check.expected, out=check.progress.new_empty(()))
        # The number of the call if it is mispaired, else NEVER.
        number = torch.rsub(is_mispaired, NEVER, alpha=NEVER - check.call)
        torch.minimum(check.progress[0], number, out=check.progress[0])
        check.progress[1].fill_(check.call)
