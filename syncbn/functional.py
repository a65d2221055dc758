"""Functional synchronised batch normalisation, with formula and gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.autograd import normalise
from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.reduce import group_size
from syncbn.errors import InputError
from syncbn.moments import Moments
from syncbn.passes import moments_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sync_batch_norm(
    input: Tensor,  # noqa: A002 - named as in torch.nn.functional.batch_norm
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Moments]:
    """Normalise each channel by statistics over the values of all ranks.

    The result is that of one batch on one device. Forward, with sums over the n values of a channel on all
    ranks:

        μ = Σx / n,   σ² = Σ(x - μ)² / n,   x̂ = (x - μ) / √(σ² + eps),   y = weight·x̂ + bias

    Backward, with S = Σdy and D = Σdy·x̂ over the same values:

        dx = weight / √(σ² + eps) · (dy - S/n - x̂·D/n)

    dx is the gradient of the *sum* of the ranks' losses, since the values of a rank affect the outputs of
    all. The gradients of weight and bias are this rank's share, Σdy·x̂ and Σdy over its own values, as for
    any other parameter. Averaged over W ranks, as by DistributedDataParallel, they are those of the mean loss
    over all samples if every rank has equally many; otherwise weight the mean loss of a rank by W·nᵣ/n, with
    nᵣ its samples and n those of all ranks.

    Accumulation: ranks exchange float64 for every input dtype, including counts. Within a rank, long float32
    sums are float64 sums of short float32 sums. The statistics are bitwise equal on every rank.

    Collectives: one forward and one backward, each of one float64 vector, by every rank of the group and in
    the same order of layers. Forward it is an all_reduce of [n, n·mean, M2 + n·mean²], or for float64 input
    an all_gather of [n, mean, M2]; backward an all_reduce of [S, D]. Both have 2C + 2 elements, of which the
    first shows whether the ranks are in the same call. A group of one rank issues none.

    A rank without values (N = 0) takes part in both collectives, adds zeros and gets an empty output. If no
    rank has a value, the moments are zero.

    Args:
        input: shape (N, C, *), float16, bfloat16, float32 or float64; the dtype is the same on every rank,
            while N and * may differ.
        weight: scale, shape (C,), of any floating dtype; None means 1.
        bias: shift, shape (C,), of any floating dtype; None means 0.
        eps: added to the variance.
        process_group: ranks to synchronise over; None means all ranks.

    Returns:
        The output, with shape, dtype and memory format of the input, and the moments over all ranks, without
        gradient.

    Raises:
        InputError: the shape, dtype or device of input, weight or bias is not supported (on this rank, before
            any collective); or all ranks together have a single value per channel (on every rank).
        GroupError: this rank is not in the group (before any collective).
        DesyncError: other ranks are in another call, or do not join this one within the timeout.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1, section 3 (gradients) and section 3.2
    (convolutions). Statistics over several workers are not in the paper.
    """
    check_input(input, weight=weight, bias=bias)
    output, statistics = normalise(input, weight, bias, eps, _site_of(process_group))
    return output, moments_of(statistics)


_sites: WeakKeyDictionary[ProcessGroup, LayerCollectives] = WeakKeyDictionary()
_alone = LayerCollectives("sync_batch_norm")


def _site_of(process_group: ProcessGroup | None) -> LayerCollectives:
    """Return the identity that all calls of the function over a group share."""
    group_size(process_group)  # raises GroupError if this rank is not in the group
    group = process_group
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return _alone
    if group not in _sites:
        _sites[group] = LayerCollectives("sync_batch_norm", process_group)
    return _sites[group]


# Equivalent to torch.compiler.assume_constant_result, without importing the compiler.
_site_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_input(x: Tensor, **vectors: Tensor | None) -> None:
    """Check the input before a collective, in which other ranks would wait.

    Args:
        x: tensor to be normalised.
        vectors: parameters and buffers by name, with one element per channel, on the device of x.

    Raises:
        InputError: a type, shape, dtype or device is not supported.
    """
    for name, tensor in {"input": x, **vectors}.items():
        _check_type(name, tensor)
    shape = tuple(x.shape)
    if x.dtype not in DTYPES:
        raise InputError(f"input: dtype must be one of {', '.join(map(str, DTYPES))} (got {x.dtype})")
    if x.dim() < 2:
        raise InputError(f"input: must have two or more dimensions, (N, C, *) (got shape {shape})")
    if shape[1] == 0:
        raise InputError(f"input: must have one or more channels C in (N, C, *) (got shape {shape})")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[1:2]:
            raise InputError(
                f"{name}: must have one element per channel, {shape[1]} for an input of shape {shape} "
                f"(got shape {tuple(vector.shape)})"
            )
        if vector.device != x.device:
            raise InputError(f"{name}: must be on the device of the input, {x.device} (got {vector.device})")


def _check_type(name: str, tensor: Tensor | None) -> None:
    """Refuse tensors that are not one dense array on this rank."""
    if tensor is None:
        return
    if tensor.is_nested:
        remedy = "pad it, and pass a mask to the layer: layer(x.to_padded_tensor(0.0), mask)"
        raise InputError(f"{name}: must be a dense tensor (got NestedTensor, {tensor.layout}); {remedy}")
    # Recognised by its methods: importing the class takes half a second.
    if hasattr(tensor, "full_tensor"):
        remedy = "pass this rank's values, tensor.to_local()"
        raise InputError(f"{name}: must be a plain tensor (got {type(tensor).__name__}); {remedy}")
