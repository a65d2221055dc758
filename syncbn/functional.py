"""Batch normalisation over the data of all ranks as a function: formula, gradient, and the two collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.collective import gather_from_ranks, group_size, sum_over_ranks
from syncbn.errors import InputError
from syncbn.moments import Moments, along_channels, reduced_dimensions

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

    Accumulation is in float64 for every dtype. The statistics are the same bits on every rank.

    Collectives: one forward and one backward, each of one float64 vector, by every rank of the group and in the same
    order of layers. Forward it has 2C + 1 elements: an all_reduce of [n, n·mean, M2 + n·mean²], or for float64 input an
    all_gather of [n, mean, M2]. Backward it has 2C: an all_reduce of [S, D]. A group of one rank issues none.

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
        NotImplementedError: the gradient itself is differentiated.

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1, section 3 (gradients) and section 3.2
    (convolutions). Statistics over several workers are not in the paper.
    """
    check_input(input, weight=weight, bias=bias)
    moments = _moments_of_all_ranks(input, process_group)
    deviation_inverse = (moments.variance + eps).rsqrt()
    output: Tensor = _Normalise.apply(
        input, weight, bias, moments.mean, deviation_inverse, moments.count, process_group
    )
    return output, moments


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
        raise InputError(f"the input has dtype {x.dtype}; taken are {', '.join(map(str, DTYPES))}")
    if x.dim() < 2:
        raise InputError(f"the input has {x.dim()} dimensions, shape {shape}; taken are two or more, (N, C, *)")
    if shape[1] == 0:
        raise InputError(f"the input has no channels, shape {shape}; taken are (N, C, *) with C of 1 or more")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != shape[1:2]:
            raise InputError(
                f"the input has {shape[1]} channels, shape {shape}, but {name} has shape {tuple(vector.shape)}; "
                "taken is one element for each channel"
            )
        if vector.device != x.device:
            raise InputError(f"the input is on {x.device}, but {name} is on {vector.device}; taken is one device")


def _moments_of_all_ranks(x: Tensor, process_group: ProcessGroup | None) -> Moments:
    """Measure x and merge with the other ranks, in one collective; a rank alone needs none."""
    # The branches depend on the group's size and the dtype, which are the same on every rank, and never on the number
    # of values or on requires_grad, which are not. So no rank can miss the collective that the others are in.
    if group_size(process_group) == 1:
        moments = Moments.measure(x)
    elif x.dtype == torch.float64:
        # To add n·mean² and subtract it again would cost float64 values (mean/std)² units in the last place. A shift
        # would avoid it, but nothing is sure to be shared before the first collective: the running mean starts at 0,
        # and if the ranks had loaded different buffers, the error would be silent. Hence the parts, unmixed.
        vectors = gather_from_ranks(Moments.measure(x).pack(), process_group)
        moments = Moments.merge([Moments.unpack(vector) for vector in vectors])
    else:
        moments = Moments.unpack_sums(sum_over_ranks(Moments.measure(x).pack_sums(), process_group))
    # A total of 1 means that no rank has more than 1. So every rank then looks at the total, and all raise together;
    # and in any other case a rank with more than 1 does not make the host wait for its device.
    if x.numel() <= x.shape[1] and moments.count == 1:
        raise InputError(
            f"all ranks together hold 1 value per channel, this one an input of shape {tuple(x.shape)}; "
            "taken are 2 or more in training"
        )
    return moments


def _standardise(x: Tensor, mean: Tensor, deviation_inverse: Tensor) -> Tensor:
    """Return x̂ = (x - μ) / √(σ² + eps) as a new float64 tensor in the memory format of x."""
    return (x.to(torch.float64) - along_channels(mean, x)).mul_(along_channels(deviation_inverse, x))


class _Normalise(Function):
    """y = weight·x̂ + bias, whose gradient knows that mean and variance depend on the values of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        deviation_inverse: Tensor,
        count: Tensor,
        process_group: ProcessGroup | None,
    ) -> Tensor:
        y = _standardise(x, mean, deviation_inverse)
        if weight is not None:
            y.mul_(along_channels(weight, x))
        if bias is not None:
            y.add_(along_channels(bias, x))
        ctx.save_for_backward(x, weight, mean, deviation_inverse, count)
        ctx.process_group = process_group
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _Gradients.apply(dy, *ctx.saved_tensors, ctx.process_group)
        needed = (
            gradient.to(dtype) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        )
        return (*needed, None, None, None, None)


class _Gradients(Function):
    """The gradients of `_Normalise`, a function of their own so that to differentiate them is always an error."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        deviation_inverse: Tensor,
        count: Tensor,
        process_group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normalised = _standardise(x, mean, deviation_inverse)
        dy = dy.to(torch.float64)
        bias_gradient = dy.sum(reduced_dimensions(x))
        weight_gradient = (dy * normalised).sum(reduced_dimensions(x))
        local = torch.cat([bias_gradient, weight_gradient])
        # A rank that is empty or needs no gradient of x adds its sums all the same: they are part of the other ranks'
        # dx, and those could not know that this one stayed away. So nothing but the group's size decides here.
        total = local if group_size(process_group) == 1 else sum_over_ranks(local, process_group)
        # Without any value on any rank there is nothing to divide by, and 0/0 would be NaN.
        mean_dy, mean_dy_normalised = (total / count.clamp(min=1)).chunk(2)
        scale = deviation_inverse if weight is None else deviation_inverse * weight
        # In place on x̂, so that dx has the memory format of x whatever that of dy.
        dx = normalised.mul_(along_channels(-mean_dy_normalised, x)).add_(dy).sub_(along_channels(mean_dy, x))
        return dx.mul_(along_channels(scale, x)), weight_gradient, bias_gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("the second derivative of synchronised batch normalisation is not implemented")
