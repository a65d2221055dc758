"""CUDA kernels over the values of one rank: those of torch's SyncBatchNorm.

The formulas are those of `cpu.py`. No function makes the host wait. The kernels divide by the size of a
tensor, so they never get an empty one. Vectors always have the dtype in which the kernels accumulate.

Tensors are rows or columns, see `layout.arrange`. For columns the kernels have a fast path, whatever the
number of dimensions was.

This module has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from syncbn.kernels import vectors
from syncbn.kernels.statistics import LocalStats


def is_native(x: Tensor) -> bool:
    """Return whether torch has these kernels for a tensor."""
    return x.is_cuda


@functools.cache
def packing(device: torch.device) -> ModuleType:
    """Return the module that packs and unpacks vectors on a device."""
    if importlib.util.find_spec("triton") is None:
        return vectors
    try:
        from syncbn.kernels import triton

        triton.probe(device)
    except Exception as error:  # such as no C compiler for its launcher, or an old device
        warnings.warn(f"Triton cannot be used on {device}, and the layer is slower: {error}", stacklevel=2)
        return vectors
    return triton


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which the kernels accumulate."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def measure(x: Tensor) -> LocalStats:
    """Return mean and variance of each channel, shape (C,), by Welford's pass."""
    # Not batch_norm_stats: its inverse deviation is 0 for a constant channel as for an infinite variance.
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return LocalStats(x.numel() // x.shape[1], mean, variance, are_sums=False)


def normalise(x: Tensor, rounded: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight·(x - mean) / √(variance + eps) + bias.

    `rounded` are mean and inverse deviation, shape (2, C).
    """
    # The kernel takes both in the dtype of x, or both in that of the statistics.
    if any(vector is not None and vector.dtype != x.dtype for vector in (weight, bias)):
        dtype = accumulator(x)
        weight, bias = (None if vector is None else vector.to(dtype) for vector in (weight, bias))
    mean, inverse = rounded.unbind()
    return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)


def reduce_gradient(dy: Tensor, x: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σdy and Σdy·(x - centre) of each channel, shape (C,).

    The centre is the rounded mean.
    """
    centre, inverse = rounded.unbind()
    total, product, _, _ = torch.batch_norm_backward_reduce(dy, x, centre, inverse, None, True, False, False)
    return total, product


def combine_gradient(dy: Tensor, x: Tensor, rounded: Tensor, weight: Tensor | None, means: Tensor) -> Tensor:
    """Return weight / √(variance + eps)·(dy - mean of dy - x̂·mean of dy·x̂).

    The kernel divides Σdy and Σdy·(x - mean) by a count; it gets their means, shape (2, C), and the count 1.
    The weight has the accumulator dtype.
    """
    mean, inverse = rounded.unbind()
    mean_dy, mean_product = means.unbind()
    one = _one(x.device)
    return torch.batch_norm_backward_elemt(dy, x, mean, inverse, weight, mean_dy, mean_product, one)


@functools.cache
def _one(device: torch.device) -> Tensor:
    # Of its own: the first use may be in inference mode or under fake tensors.
    with torch.inference_mode(False), _disable_current_modes():
        return torch.ones(1, dtype=torch.int32, device=device)
