"""CPU stand-ins for torch's CUDA kernels of batch normalisation, by the semantics of
aten/src/ATen/native/cuda/Normalization.cu.

They check dtypes as the kernels do, read memory as the kernels do where both tensors are channels-last,
accumulate in float32 in the order of threads, and return an inverse deviation of 0 where variance and eps are
both 0.
"""

import contextlib
import importlib
import math
import os
from unittest import mock

import torch

from syncbn.collectives import reduce
from syncbn.kernels import cuda, vectors
from tests.syncbn.launch_counter import as_one_launch, one_launch

ACCUMULATOR = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
THREADS = 512


@contextlib.contextmanager
def interpreted_triton():
    """Return the module of Triton's kernels, which run in its interpreter."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        yield importlib.import_module("syncbn.kernels.triton")


@contextlib.contextmanager
def emulated_cuda(packing="triton", queued=False, enabled=True):
    """Send CPU tensors down the layer's CUDA path, over the stand-ins.

    `packing` is "triton", in Triton's interpreter, or "vectors". With `queued`, collectives are treated as
    those on a device stream, whose stamps are compared on the device.
    """
    if not enabled:
        yield
        return
    with contextlib.ExitStack() as patches:
        module = patches.enter_context(interpreted_triton()) if packing == "triton" else vectors
        patches.enter_context(mock.patch.object(cuda, "is_native", return_value=True))
        patches.enter_context(mock.patch.object(cuda, "packing", return_value=module))
        patches.enter_context(mock.patch.object(reduce, "_is_queued", return_value=queued))
        patches.enter_context(
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False)
        )
        for function in (
            batch_norm_stats,
            batch_norm_update_stats,
            batch_norm_elemt,
            batch_norm_backward_reduce,
            batch_norm_backward_elemt,
            batch_norm_gather_stats_with_counts,
        ):
            patches.enter_context(mock.patch.object(torch, function.__name__, as_one_launch(function)))
        if packing == "triton":
            launch = module._launch

            def launch_one(kernel, *arguments, **constants):
                with one_launch(kernel.__name__):
                    launch(kernel, *arguments, **constants)

            patches.enter_context(mock.patch.object(module, "_launch", launch_one))
        patches.enter_context(mock.patch.object(vectors, "head", as_one_launch(vectors.head)))
        patches.enter_context(mock.patch.object(reduce, "_await", as_one_launch(reduce._await, "collective")))
        yield


def batch_norm_stats(x, eps):
    """Return mean and 1 / √(variance + eps)."""
    mean, variance = _welford(x)
    inverse = 1 / torch.sqrt((variance.double() + eps).to(variance.dtype))
    return mean, torch.where((variance != 0) | (eps != 0), inverse, torch.zeros_like(variance))


def batch_norm_update_stats(x, running_mean, running_var, momentum):
    """Return mean and biased variance; the layer has no running statistics updated here."""
    _check(running_mean is None and running_var is None, "running statistics are not emulated")
    return _welford(x)


def batch_norm_elemt(x, weight, bias, mean, inverse, eps):
    """Return weight·(x - mean)·inverse + bias."""
    _check(x.numel() > 0, "an empty input")
    parameter = weight if weight is not None else bias
    is_mixed = parameter is not None and parameter.dtype != x.dtype
    accumulator = ACCUMULATOR[x.dtype]
    kept = accumulator if is_mixed else x.dtype
    for vector in (weight, bias):
        _check(vector is None or vector.dtype == kept, f"parameters of another dtype than {kept}")
    for vector in (mean, inverse):
        _check(vector.dtype == ACCUMULATOR[kept], f"statistics of another dtype than {ACCUMULATOR[kept]}")
    scale = 1 if weight is None else _along(weight.to(accumulator), x)
    shift = 0 if bias is None else _along(bias.to(accumulator), x)
    y = scale * (x.to(accumulator) - _along(mean, x)) * _along(inverse, x) + shift
    return torch.empty_like(x).copy_(y.to(x.dtype))


def batch_norm_backward_reduce(dy, x, mean, inverse, weight, input_wanted, weight_wanted, bias_wanted):
    """Return Σdy and Σdy·(x - mean), and the gradients of weight and bias."""
    accumulator = ACCUMULATOR[x.dtype]
    _check(x.numel() > 0, "an empty input")
    _check(dy.dtype == x.dtype, f"a gradient of another dtype than {x.dtype}")
    _check(mean.dtype == inverse.dtype == accumulator, f"statistics of another dtype than {accumulator}")
    _check(weight is None or weight.dtype in (x.dtype, accumulator), "a weight of another dtype")
    if _is_channels_last(dy) and _is_channels_last(x):
        gradients, values = _raw(dy), _raw(x)
    else:
        gradients, values = (tensor.movedim(1, -1).reshape(-1, x.shape[1]) for tensor in (dy, x))
    threads = _threads(values.shape[0])
    (gradients, valid), (values, _) = (
        _lanes(tensor.to(accumulator), threads) for tensor in (gradients, values)
    )
    total = product = torch.zeros(threads, x.shape[1], dtype=accumulator)
    for gradient, value, is_valid in zip(gradients, values, valid, strict=True):
        total = total + gradient
        product = product + torch.where(is_valid, gradient * (value - mean), 0)
    while total.shape[0] > 1:
        half = total.shape[0] // 2
        total, product = total[:half] + total[half:], product[:half] + product[half:]
    weight_gradient = product[0] * inverse if weight_wanted else mean.new_empty(0)
    return total[0], product[0], weight_gradient, total[0] if bias_wanted else mean.new_empty(0)


def batch_norm_backward_elemt(dy, x, mean, inverse, weight, total, product, count):
    """Return the gradient of x; contiguous unless both tensors are channels-last, as the general kernel's."""
    accumulator = ACCUMULATOR[dy.dtype]
    _check(x.numel() > 0, "an empty input")
    _check(count.dtype == torch.int32, "a count that is not int32")
    _check(dy.dtype == x.dtype, f"a gradient of another dtype than {x.dtype}")
    is_channels_last = _is_channels_last(dy) and _is_channels_last(x)
    is_half = x.dtype in (torch.float16, torch.bfloat16) and mean.dtype == torch.float32
    kept = accumulator if is_half else x.dtype
    taken = (x.dtype, accumulator) if is_channels_last else (kept,)
    _check(weight is None or weight.dtype in taken, f"a weight of another dtype than {taken}")
    for vector in (mean, inverse, total, product):
        _check(vector.dtype == ACCUMULATOR[kept], f"statistics of another dtype than {ACCUMULATOR[kept]}")
    share = 1 / count.long().sum().to(accumulator)
    factor = inverse * (1 if weight is None else weight.to(accumulator))
    slope = inverse * inverse * product * share
    centred = x.to(accumulator) - _along(mean, x)
    dx = (dy.to(accumulator) - _along(total * share, x) - centred * _along(slope, x)) * _along(factor, x)
    dx = dx.to(x.dtype)
    return torch.empty_like(x).copy_(dx) if is_channels_last else dx.contiguous()


def batch_norm_gather_stats_with_counts(x, mean, inverse, running_mean, running_var, momentum, eps, counts):
    """Merge the statistics of W ranks, (W, C), and update running statistics; not used by this layer."""
    accumulator = ACCUMULATOR[x.dtype]
    counts = counts.to(accumulator).view(-1, 1)
    n = counts.sum()
    total = (mean * counts).sum(0) / n
    variance = ((inverse**-2 - eps) * counts + (mean - total) ** 2 * counts).sum(0) / n
    if running_mean is not None:
        running_mean.lerp_(total, momentum)
        running_var.lerp_(variance * n / (n - 1), momentum)
    return total, (variance + eps).rsqrt()


def _check(is_taken, what):
    if not is_taken:
        raise RuntimeError(f"the CUDA kernel refuses {what}")


def _along(vector, x):
    return vector.view(1, -1, *(1,) * (x.dim() - 2))


def _is_channels_last(x):
    return (
        (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
        or (x.is_contiguous() and x.stride(1) == 1)
    )


def _raw(x):
    """Return what a kernel sees that reads memory as (M, C), whatever the strides; beyond the storage is an
    error.
    """
    channels = x.shape[1]
    rows = x.numel() // channels
    needed = x.storage_offset() + rows * channels
    _check(needed <= x.untyped_storage().nbytes() // x.element_size(), "memory beyond the storage")
    return x.as_strided((rows, channels), (channels, 1))


def _threads(rows):
    return THREADS if rows >= THREADS else 1 << (max(rows, 1).bit_length() - 1)


def _lanes(values, threads):
    """Cut (M, C) into steps of one row per thread; return also which rows are not padding."""
    rows, channels = values.shape
    steps = math.ceil(rows / threads)
    padded = torch.cat([values, values.new_zeros(steps * threads - rows, channels)])
    valid = torch.arange(steps * threads) < rows
    return padded.view(steps, threads, channels), valid.view(steps, threads, 1)


def _welford(x):
    """Return mean and biased variance by Welford's method in each thread, merged in a tree."""
    _check(x.numel() > 0, "an empty input")
    accumulator = ACCUMULATOR[x.dtype]
    channels = x.shape[1]
    rows = _raw(x) if _is_channels_last(x) else x.movedim(1, -1).reshape(-1, channels)
    threads = _threads(rows.shape[0])
    mean = m2 = torch.zeros(threads, channels, dtype=accumulator)
    count = torch.zeros(threads, 1, dtype=accumulator)
    for values, is_valid in zip(*_lanes(rows.to(accumulator), threads), strict=True):
        count = count + is_valid
        difference = values - mean
        moved = torch.where(is_valid, mean + difference / count.clamp(min=1), mean)
        m2 = torch.where(is_valid, m2 + difference * (values - moved), m2)
        mean = moved
    while count.shape[0] > 1:
        half = count.shape[0] // 2
        (first, second), (one, other) = count.split(half), mean.split(half)
        together = (first + second).clamp(min=1)
        m2 = m2[:half] + m2[half:] + (one - other) ** 2 * first * second / together
        mean, count = (first * one + second * other) / together, first + second
    return mean[0], m2[0] / count[0]
