"""Triton kernels that pack and unpack the vectors of a layer's collectives.

Each of the four steps around the two collectives of a layer is one launch on the GPU. The formulas are those
of `syncbn.kernels.vectors`, which does the same by operators of torch, in float64. Stamps, counts and call
numbers are arguments of the kernels and no copy to the device; a stamp is compared on the device.

Triton passes a Python float as float32, so that eps and momentum are the sum of two arguments each. Fused
multiply-add is disabled: the same bits result everywhere, and in Triton's interpreter.

The kernels are tested in the interpreter and compiled for three GPUs, and have not run on one yet.
"""

# The annotations of a kernel's arguments are read by Triton, so they must not be postponed.
import functools
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncbn.kernels.statistics import HEAD, NEVER, BatchStats, Check, LocalStats, RunningStats, new_vector

BLOCK = 256
NOT_MISPAIRED = tl.constexpr(NEVER)


@triton.jit(do_not_specialize=["stamp", "count"])
def pack_forward_kernel(
    vector,  # (HEAD + 2C or 3C) float64, written
    mean,  # (C) float32 or float64
    variance,  # (C)
    stamp,
    count,
    channels,
    GATHER: tl.constexpr,  # mean and M2 instead of Σx and Σx²
    SHARE: tl.constexpr,  # M2 as well
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write [stamp, n, Σx, Σx²], or [stamp, n, mean, M2]."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < channels
    n = (tl.full((), 0, tl.int64) + count).to(tl.float64)
    m = tl.load(mean + channel, is_channel, 0.0).to(tl.float64)
    v = tl.load(variance + channel, is_channel, 0.0).to(tl.float64)
    body = vector + HEAD + channel
    if GATHER:
        tl.store(body, m, is_channel)
        tl.store(body + channels, v * n, is_channel)
    else:
        tl.store(body, m * n, is_channel)
        tl.store(body + channels, (v + m * m) * n, is_channel)
        if SHARE:
            tl.store(body + 2 * channels, v * n, is_channel)
    if tl.program_id(0) == 0:
        tl.store(vector, (tl.full((), 0, tl.int64) + stamp).to(tl.float64))
        tl.store(vector + 1, n)


@triton.jit
def store_rounded(pointers, values, mask):
    """Store float64 values in the dtype of the pointers, halves by way of float32."""
    if pointers.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask)


@triton.jit
def note_kernel(stamp, progress, expected, call):
    """Compare a summed stamp, and note the call as complete."""
    # An argument of a kernel may be an int32, or in the interpreter a Python number.
    number = tl.full((), 0, tl.int64) + call
    is_mispaired = stamp != (tl.full((), 0, tl.int64) + expected).to(tl.float64)
    tl.atomic_min(progress, tl.where(is_mispaired, number, NOT_MISPAIRED))
    tl.atomic_max(progress + 1, number)


@triton.jit(do_not_specialize=["expected", "call", "ranks", "row"])
def unpack_forward_kernel(
    vector,  # (K) or (W, K) float64
    moments,  # (HEAD + 2C or 3C) float64, written; it may be `vector`
    rounded,  # (2, C) accumulator dtype, written: mean and 1 / √(variance + eps)
    running_mean,  # (C), updated
    running_var,  # (C), updated
    batches,  # () int64, updated
    progress,  # (2) int64, updated
    expected,
    call,
    ranks,
    row,  # elements of a rank's vector
    channels,
    eps_high,
    eps_low,
    momentum_high,
    momentum_low,
    GATHERED: tl.constexpr,
    SHARE: tl.constexpr,
    TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    CHECK: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write moments over all ranks, update running statistics, compare the stamp."""
    # One program for all channels: it reads the counter and the stamp before any program may change them.
    zero = tl.full((), 0.0, tl.float64)
    stamp = zero
    n = zero
    for rank in range(ranks):
        stamp += tl.load(vector + rank * row)
        n += tl.load(vector + rank * row + 1)
    divisor = tl.maximum(n, 1.0)
    eps = zero + eps_high + eps_low
    if TRACK:
        seen = tl.load(batches)
        if CUMULATIVE:
            weight = 1.0 / tl.maximum((seen + 1).to(tl.float64), 1.0)
        else:
            weight = zero + momentum_high + momentum_low
        weight = tl.where(n > 1, weight, 0.0)  # a single value is an error
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        is_channel = channel < channels
        body = vector + HEAD + channel
        if GATHERED:
            mean = tl.full([BLOCK], 0.0, tl.float64)
            for rank in range(ranks):
                count = tl.load(vector + rank * row + 1)
                mean += count * tl.load(body + rank * row, is_channel, 0.0)
            mean = mean / divisor
            within = tl.full([BLOCK], 0.0, tl.float64)
            between = tl.full([BLOCK], 0.0, tl.float64)
            for rank in range(ranks):
                count = tl.load(vector + rank * row + 1)
                distance = tl.load(body + rank * row, is_channel, 0.0) - mean
                between += count * (distance * distance)
                within += tl.load(body + rank * row + channels, is_channel, 0.0)
            variance = (within + between) / divisor
            if SHARE:
                tl.store(moments + HEAD + 2 * channels + channel, within, is_channel)
        else:
            mean = tl.load(body, is_channel, 0.0) / divisor
            variance = tl.load(body + channels, is_channel, 0.0) / divisor - mean * mean
            variance = tl.where(variance < 0, 0.0, variance)  # NaN remains
        tl.store(moments + HEAD + channel, mean, is_channel)
        tl.store(moments + HEAD + channels + channel, variance, is_channel)
        inverse = 1.0 / tl.sqrt(variance + eps)
        store_rounded(rounded + channel, mean, is_channel)
        store_rounded(rounded + channels + channel, inverse, is_channel)
        if TRACK:
            unbiased = variance * (n / tl.maximum(n - 1.0, 1.0))
            old_mean = tl.load(running_mean + channel, is_channel, 0.0).to(tl.float64)
            old_var = tl.load(running_var + channel, is_channel, 0.0).to(tl.float64)
            new_mean = old_mean + weight * (mean - old_mean)
            new_var = old_var + weight * (unbiased - old_var)
            store_rounded(running_mean + channel, new_mean, is_channel)
            store_rounded(running_var + channel, new_var, is_channel)
    if TRACK:
        tl.debug_barrier()  # every warp has read the counter
        tl.store(batches, seen + (n > 1).to(tl.int64))
    if GATHERED:
        tl.store(moments, stamp)
        tl.store(moments + 1, n)
    if CHECK:
        note_kernel(stamp, progress, expected, call)


@triton.jit(do_not_specialize=["stamp"])
def pack_backward_kernel(
    vector,  # (HEAD + 2C) float64, written
    weight_gradient,  # (C), written
    bias_gradient,  # (C), written
    total,  # (C) accumulator dtype: Σdy
    product,  # (C): Σdy·(x - centre)
    moments,  # (HEAD + 2C) float64
    rounded,  # (2, C): the centre is rounded
    stamp,
    channels,
    eps_high,
    eps_low,
    HAS_VALUES: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write [stamp, 0, Σdy, Σdy·x̂] and this rank's gradients of weight and bias."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < channels
    eps = tl.full((), 0.0, tl.float64) + eps_high + eps_low
    s = tl.full([BLOCK], 0.0, tl.float64)
    d = tl.full([BLOCK], 0.0, tl.float64)
    if HAS_VALUES:
        s = tl.load(total + channel, is_channel, 0.0).to(tl.float64)
        p = tl.load(product + channel, is_channel, 0.0).to(tl.float64)
        mean = tl.load(moments + HEAD + channel, is_channel, 0.0)
        variance = tl.load(moments + HEAD + channels + channel, is_channel, 0.0)
        centre = tl.load(rounded + channel, is_channel, 0.0).to(tl.float64)
        d = (p - s * (mean - centre)) * (1.0 / tl.sqrt(variance + eps))
    tl.store(vector + HEAD + channel, s, is_channel)
    tl.store(vector + HEAD + channels + channel, d, is_channel)
    store_rounded(bias_gradient + channel, s, is_channel)
    store_rounded(weight_gradient + channel, d, is_channel)
    if tl.program_id(0) == 0:
        tl.store(vector, (tl.full((), 0, tl.int64) + stamp).to(tl.float64))
        tl.store(vector + 1, tl.full((), 0.0, tl.float64))


@triton.jit(do_not_specialize=["expected", "call"])
def unpack_backward_kernel(
    vector,  # (HEAD + 2C) float64: sums over the ranks
    means,  # (2, C) accumulator dtype, written: Σdy / n and Σdy·(x - mean) / n
    converted,  # (C) accumulator dtype, written: the weight
    moments,  # (HEAD + 2C) float64
    weight,  # (C)
    progress,  # (2) int64, updated
    expected,
    call,
    channels,
    eps_high,
    eps_low,
    CONVERT: tl.constexpr,
    CHECK: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the means of dy and dy·(x - mean) over all ranks, and compare the stamp.

    Also converts the weight, which torch's kernel takes in the accumulator dtype alone.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < channels
    eps = tl.full((), 0.0, tl.float64) + eps_high + eps_low
    divisor = tl.maximum(tl.load(moments + 1), 1.0)
    s = tl.load(vector + HEAD + channel, is_channel, 0.0) / divisor
    d = tl.load(vector + HEAD + channels + channel, is_channel, 0.0) / divisor
    variance = tl.load(moments + HEAD + channels + channel, is_channel, 0.0)
    product = d * tl.sqrt(variance + eps)
    store_rounded(means + channel, s, is_channel)
    store_rounded(means + channels + channel, product, is_channel)
    if CONVERT:
        value = tl.load(weight + channel, is_channel, 0.0)
        tl.store(converted + channel, value.to(converted.dtype.element_ty), is_channel)
    if CHECK and tl.program_id(0) == 0:
        note_kernel(tl.load(vector), progress, expected, call)


def pack_forward(
    local: LocalStats, channels: int, device: torch.device, stamp: int, *, gather: bool, share: bool
) -> Tensor:
    """See `vectors.pack_forward`."""
    vector = new_vector(channels, device, share and not gather)
    _launch(
        pack_forward_kernel, _blocks(channels), vector, local.first, local.second, stamp, local.count,
        channels, GATHER=gather, SHARE=share and not gather, HEAD=HEAD, BLOCK=BLOCK,
    )  # fmt: skip
    return vector


def unpack_forward(
    vector: Tensor,
    channels: int,
    accumulator: torch.dtype,
    eps: float,
    running: RunningStats | None,
    check: Check | None,
    *,
    share: bool,
) -> BatchStats:
    """See `vectors.unpack_forward`."""
    is_gathered = vector.dim() == 2
    moments = new_vector(channels, vector.device, share) if is_gathered else vector
    rounded = vector.new_empty(2, channels, dtype=accumulator)
    is_tracked = running is not None
    mean, variance, batches = (rounded,) * 3 if running is None else running.buffers
    _launch(
        unpack_forward_kernel, 1, vector, moments, rounded, mean, variance, batches,
        *_check_arguments(check, vector), vector.shape[0] if is_gathered else 1, vector.shape[-1], channels,
        *_in_two(eps), *_in_two((running and running.momentum) or 0.0),
        GATHERED=is_gathered, SHARE=share, TRACK=is_tracked,
        CUMULATIVE=running is not None and running.momentum is None, CHECK=check is not None,
        HEAD=HEAD, BLOCK=BLOCK,
    )  # fmt: skip
    return BatchStats.of(moments, channels, eps, rounded=rounded)


def pack_backward(
    sums: tuple[Tensor, Tensor] | None,
    moments: Tensor,
    rounded: Tensor,
    eps: float,
    stamp: int,
    gradients: tuple[Tensor, Tensor],
) -> Tensor:
    """See `vectors.pack_backward`."""
    channels = rounded.shape[1]
    vector = new_vector(channels, moments.device, share=False)
    _launch(
        pack_backward_kernel, _blocks(channels), vector, *gradients, *(sums or (vector, vector)), moments,
        rounded, stamp, channels, *_in_two(eps), HAS_VALUES=sums is not None, HEAD=HEAD, BLOCK=BLOCK,
    )  # fmt: skip
    return vector


def unpack_backward(
    vector: Tensor, moments: Tensor, rounded: Tensor, eps: float, check: Check | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `vectors.unpack_backward`."""
    channels = rounded.shape[1]
    means = torch.empty_like(rounded)
    weight = None if weight is None else weight.contiguous()
    is_converted = weight is not None and weight.dtype != rounded.dtype
    converted = rounded.new_empty(channels) if is_converted else weight
    _launch(
        unpack_backward_kernel, _blocks(channels), vector, means, rounded if converted is None else converted,
        moments, rounded if weight is None else weight, *_check_arguments(check, vector), channels,
        *_in_two(eps), CONVERT=is_converted, CHECK=check is not None, HEAD=HEAD, BLOCK=BLOCK,
    )  # fmt: skip
    return means, converted


def probe(device: torch.device) -> None:
    """Compile and launch a kernel.

    Raises an error of Triton or of the compiler that it needs if that is not possible.
    """
    zeros = torch.zeros(1, device=device)
    local = LocalStats(0, zeros, zeros, are_sums=False)
    pack_forward(local, 1, device, 1 << 39, gather=False, share=False)


def _launch(kernel: Any, programs: int, vector: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of a vector, which is its first argument."""
    with torch.cuda.device_of(vector):
        kernel[(programs,)](vector, *arguments, **constants, enable_fp_fusion=False)


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


@functools.lru_cache(maxsize=256)
def _in_two(number: float) -> tuple[float, float]:
    """Return a number as the sum of two that kernels get as float32."""
    (high,) = struct.unpack("f", struct.pack("f", number))
    return high, number - high


def _check_arguments(check: Check | None, unused: Tensor) -> tuple[Tensor, int, int]:
    return (unused, 0, 0) if check is None else check
