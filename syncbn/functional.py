"""Functional synchronised batch normalisation, with formula and gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.autograd import moments_of, normalise
from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.reduce import group_size
from syncbn.errors import InputError
from syncbn.moments import Moments

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
    """Normalise each channel by the statistics of all ranks' values, as if these were one batch on one device.

    Forward, with sums over the n values that all ranks together hold of a channel:

        μ = Σx / n,   σ² = Σ(x - μ)² / n,   x̂ = (x - μ) / √(σ² + eps),   y = weight·x̂ + bias

    Backward, with S = Σdy and D = Σdy·x̂ over the same values:

        dx = weight / √(σ² + eps) · (dy - S/n - x̂·D/n)

    dx is the gradient of the *sum* of the ranks' losses, since a rank's values enter the outputs of all. The gradients
    of weight and bias are this rank's share, Σdy·x̂ and Σdy over its own values, as with any other parameter. Averaged
    over W ranks, as DistributedDataParallel does, they are those of the mean loss over all samples if every rank holds
    as many; otherwise weight a rank's mean loss by W·nᵣ/n, with nᵣ its samples and n those of all ranks.

    What the ranks exchange, counts included, is float64 for every dtype; a rank's own sums over many float32 values are
    added up from short ones of float32. The statistics are the same bits on every rank.

    Collectives: one forward and one backward, each of one float64 vector, by every rank of the group and in the same
    order of layers. Forward it is an all_reduce of [n, n·mean, M2 + n·mean²], or for float64 input an all_gather of
    [n, mean, M2]; backward an all_reduce of [S, D]. Both have 2C + 3 elements, of which the first two show whether the ranks
    are in the same call. A group of one rank issues none.

    A rank without values (N = 0) takes part in both collectives, adds nothing to them and gets an empty output. If no
    rank has a value, the moments are zero.

    Args:
        input: shape (N, C, *), float16, bfloat16, float32 or float64; the dtype is the same on every rank, while
            N and * may differ.
        weight: scale, shape (C,), of any floating dtype; None means 1.
        bias: shift, shape (C,), of any floating dtype; None means 0.
        eps: added to the variance.
        process_group: ranks to synchronise over; None means all of them.

    Returns:
        The output, in shape, dtype and memory format as the input; and the moments of all ranks' values, which carry
        no gradient.

    Raises:
        InputError: the input, weight or bias has a shape, dtype or device not taken (on this rank, before any
            collective); or all ranks together hold a single value per channel (on every rank).
        GroupError: this rank is not in the group (before any collective).
        DesyncError: the other ranks are in another call, or stay away from this one past the time limit.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1, section 3 (gradients) and section 3.2
    (convolutions). Statistics over several workers are not in the paper.
    """
    check_input(input, weight=weight, bias=bias)
    output, statistics = normalise(input, weight, bias, eps, _site_of(process_group))
    return output, moments_of(statistics)


_sites: WeakKeyDictionary[ProcessGroup, LayerCollectives] = WeakKeyDictionary()
_alone = LayerCollectives("sync_batch_norm")


def _site_of(process_group: ProcessGroup | None) -> LayerCollectives:
    """Return the call site that all calls of the function over a group share."""
    group_size(process_group)  # refuses a group that this rank is not in
    group = process_group
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return _alone
    if group not in _sites:
        _sites[group] = LayerCollectives("sync_batch_norm", process_group)
    return _sites[group]


# What torch.compiler.assume_constant_result does, without importing the compiler for those who do not use it.
_site_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_input(x: Tensor, **vectors: Tensor | None) -> None:
    """Refuse what cannot be normalised, before a collective in which the other ranks would wait for this one.

    Args:
        x: the tensor to be normalised.
        vectors: parameters and buffers by name: one element for each channel, on the device of x.

    Raises:
        InputError: it says what came and what is taken.
    """
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
