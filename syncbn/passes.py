"""Forward and backward passes: measure, exchange statistics, normalise.

On a GPU each step around a collective is one launch, see `syncbn.kernels.triton`.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import Function

from syncbn.collectives.context import CollectiveId, LayerCollectives
from syncbn.collectives.reduce import all_gather, all_reduce, check_group, group_of_pass
from syncbn.errors import InputError
from syncbn.kernels import cpu, cuda, vectors
from syncbn.kernels.layout import along_channels, arrange, arrange_like, rearrange, reduced_dimensions
from syncbn.kernels.statistics import HEAD, BatchStats, Check, LocalStats, RunningStats, at_least_one
from syncbn.moments import Moments


def select(x: Tensor, mask: Tensor) -> Tensor:
    """Return the values selected by the mask, shape (n, C).

    n may differ between ranks and may be 0.
    """
    return x.movedim(1, -1)[mask]


def put_back(values: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Return selected values in the shape and memory format of x, with 0 elsewhere."""
    positions = x.movedim(1, -1)
    return torch.zeros_like(positions).index_put((mask,), values).movedim(-1, 1)


def moments_of(statistics: BatchStats) -> Moments:
    """Return count, mean and M2."""
    count = torch.as_tensor(statistics.count, dtype=torch.float64, device=statistics.vector.device)
    return Moments(count, statistics.mean, statistics.variance * count)


def forward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    site: LayerCollectives,
    running: RunningStats | None,
    keep_record: bool,
) -> tuple[Tensor, BatchStats]:
    """Normalise x by the statistics of all ranks, and update running statistics.

    A recomputation returns the statistics of its first pass, and leaves running statistics.

    Collectives: one, also on an empty rank; none in a recomputation, and in a group of one rank.
    """
    if mask is not None:
        y, statistics = forward(select(x, mask), None, weight, bias, eps, site, running, keep_record)
        return put_back(y, mask, x), statistics
    values = arrange(x)
    local = measure(values)
    # Branches depend only on group size, dtype and settings of the layer, which are equal on every rank, and
    # not on the number of values or requires_grad. A recomputation happens on every rank. So every rank
    # reaches the collective.
    if (recalled := recall(values, local, site)) is not None:
        statistics = recalled
    else:
        statistics = _exchange(values, local, eps, site, running)
        site.store(values, local, statistics, keep_record)
    return rearrange(normalise_values(values, statistics, weight, bias), x, values), statistics


def measure(values: Tensor) -> LocalStats:
    """Return the statistics of the values of this rank, rows or columns."""
    if not cuda.is_native(values):
        return cpu.measure_local(values)
    if values.numel() == 0:
        zeros = values.new_zeros(values.shape[1], dtype=cuda.accumulator(values))
        return LocalStats(0, zeros, zeros, are_sums=False)
    return cuda.measure(values)


def recall(values: Tensor, local: LocalStats, site: LayerCollectives) -> BatchStats | None:
    """Return the statistics of the pass that is being recomputed, or None."""
    recalled = site.lookup(values, local)
    if recalled is None:
        return None
    vector = recalled.vector.clone()
    vector[0] = 0
    return replace(recalled, vector=vector)  # its moments are a view of the former vector


def _exchange(
    values: Tensor, local: LocalStats, eps: float, site: LayerCollectives, running: RunningStats | None
) -> BatchStats:
    """Merge the statistics of all ranks by one collective; update running statistics.

    float32 and half precision are summed as [n, Σx, Σx²]. float64 values are gathered as [n, mean, M2]:
    adding and subtracting n·mean² would cost them (mean/std)² units in the last place. A shift by a shared
    value would avoid this, but no value is known to be shared before the first collective: the running mean
    starts at 0, and ranks that have loaded different buffers would produce a silent error.
    """
    group = group_of_pass(site)
    gather = values.dtype == torch.float64
    # A separate phase, so that ranks with different dtypes get a DesyncError.
    phase = "forward in float64" if gather else "forward"
    call = None if group is None else site.next_call(phase, group)
    vector = pack_forward(values, local, call.stamp if call else 1, site, running)
    check: Check | None = None
    if call is None:
        vector = vector.unsqueeze(0) if gather else vector
    elif gather:
        vector, check = all_gather(vector, call)
    else:
        check = all_reduce(vector, call)
    statistics = unpack_forward(values, local, vector, check, eps, site, running)
    statistics.group = None if group is None else ref(group)
    return statistics


def _packing(values: Tensor, running: RunningStats | None) -> ModuleType:
    """Return the module that packs and unpacks the vectors of a forward pass."""
    if cuda.is_native(values) and (running is None or running.is_contiguous):
        return cuda.packing(values.device)
    return vectors


def pack_forward(
    values: Tensor, local: LocalStats, stamp: int, site: LayerCollectives, running: RunningStats | None
) -> Tensor:
    """Return the vector of the forward collective."""
    gather = values.dtype == torch.float64
    vector: Tensor = _packing(values, running).pack_forward(
        local, values.shape[1], values.device, stamp, gather=gather, share=site.share_wanted
    )
    return vector


def unpack_forward(
    values: Tensor,
    local: LocalStats,
    vector: Tensor,
    check: Check | None,
    eps: float,
    site: LayerCollectives,
    running: RunningStats | None,
) -> BatchStats:
    """Return the statistics over the ranks, and update running statistics.

    Raises:
        InputError: all ranks together have a single value per channel.
    """
    accumulator = cuda.accumulator(values) if cuda.is_native(values) else None
    packing = _packing(values, running)
    statistics: BatchStats = packing.unpack_forward(
        vector, values.shape[1], accumulator, eps, running, check, share=site.share_wanted
    )
    # If the total is 1, no rank has more than 1 value, so every rank reads the total and all raise together.
    # A rank with more values does not read it, since that would make the host wait for the device.
    if local.count <= 1 and statistics.count == 1:
        raise InputError(
            "input: all ranks together must have 2 or more values per channel in training "
            f"(got 1, of which {local.count} on this rank)"
        )
    if running is not None and packing is vectors:
        # A rank with 2 or more values knows without reading it that the total is not less.
        running.update(statistics, local.count > 1 or statistics.count > 1)
    return statistics


def normalise_values(
    values: Tensor, statistics: BatchStats, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return weight·x̂ + bias in the layout of the values."""
    if not cuda.is_native(values):
        return cpu.normalise(values, statistics, weight, bias)
    if values.numel() == 0:
        return torch.empty_like(values)
    assert statistics.rounded is not None
    return cuda.normalise(values, statistics.rounded, statistics.eps, weight, bias)


def backward(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    statistics: BatchStats,
    site: LayerCollectives,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias.

    Those of weight and bias are this rank's share.

    Collectives: one, also on an empty rank and on one that needs no gradient of x, since its sums are part of
    the dx of other ranks.

    Raises:
        GroupError: the process group of the forward pass was destroyed or re-created.
    """
    if mask is not None:
        selected = select(dy, mask), select(x, mask)
        dx, *gradients = backward(*selected, None, weight, statistics, site)
        return put_back(dx, mask, x), gradients[0], gradients[1]
    values = arrange(x)
    dy = arrange_like(dy, values)
    call = backward_call(statistics, site)
    vector, *gradients = pack_backward(dy, values, weight, statistics, call.stamp if call else 1)
    check = None if call is None else all_reduce(vector, call)
    dx = unpack_backward(dy, values, weight, statistics, vector, check)
    return rearrange(dx, x, values), gradients[0], gradients[1]


def backward_call(statistics: BatchStats, site: LayerCollectives) -> CollectiveId | None:
    """Return the next call, or None if the forward pass was over one rank."""
    if statistics.group is None:
        return None
    return site.next_call("backward", check_group(site, statistics.group()))


def pack_backward(
    dy: Tensor, values: Tensor, weight: Tensor | None, statistics: BatchStats, stamp: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the vector of the backward collective, and gradients of weight and bias."""
    if not cuda.is_native(values):
        bias_gradient, weight_gradient = cpu.reduce_gradient(dy, values, statistics)
        # The zero makes the vector as long as that of forward, so that both share a channel, and a rank that
        # skipped a layer is detected by its stamp on backends without channels.
        head = vectors.head(stamp, 0, values.device)
        return torch.cat([head, bias_gradient, weight_gradient]), weight_gradient, bias_gradient
    rounded = statistics.rounded
    assert rounded is not None
    sums = cuda.reduce_gradient(dy, values, rounded) if values.numel() else None
    like = rounded[0] if weight is None else weight
    gradients = torch.empty_like(like), torch.empty_like(like)
    vector = cuda.packing(values.device).pack_backward(
        sums, statistics.vector, rounded, statistics.eps, stamp, gradients
    )
    return vector, *gradients


def unpack_backward(
    dy: Tensor,
    values: Tensor,
    weight: Tensor | None,
    statistics: BatchStats,
    vector: Tensor,
    check: Check | None,
) -> Tensor:
    """Return the gradient of the values, in their layout."""
    if not cuda.is_native(values):
        gradient_means = vectors.rows(vector, values.shape[1]).div_(at_least_one(statistics.count))
        return cpu.combine_gradient(dy, values, statistics, weight, gradient_means)
    rounded = statistics.rounded
    assert rounded is not None
    means, weight = cuda.packing(values.device).unpack_backward(
        vector, statistics.vector, rounded, statistics.eps, check, weight
    )
    if values.numel() == 0:
        return torch.empty_like(values)
    return cuda.combine_gradient(dy, values, rounded, weight, means)


class _SumOverRanks(Function):
    """Sum of a vector over the ranks, differentiable any number of times.

    A known sum is not exchanged again.
    """

    @staticmethod
    def forward(
        vector: Tensor, statistics: BatchStats, site: LayerCollectives, known: Tensor | None
    ) -> Tensor:
        if known is not None:
            return known.clone()
        call = backward_call(statistics, site)
        if call is None:
            return vector.clone()
        stamped = torch.cat([vectors.head(call.stamp, 0, vector.device), vector])
        vectors.note(stamped, all_reduce(stamped, call))
        return stamped[HEAD:].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.statistics, ctx.site, _ = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOverRanks.apply(gradient, ctx.statistics, ctx.site, None), None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        vector: Tensor,
        statistics: BatchStats,
        site: LayerCollectives,
        known: Tensor | None,
    ) -> tuple[Tensor, int]:
        def flat(tensor: Tensor, dim: int | None) -> Tensor:
            mapped = tensor.expand(info.batch_size, -1) if dim is None else tensor.movedim(dim, 0)
            return mapped.flatten()

        total = _SumOverRanks.apply(
            flat(vector, in_dims[0]), statistics, site, None if known is None else flat(known, in_dims[3])
        )
        return total.view(info.batch_size, -1), 0


def differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    statistics: BatchStats,
    site: LayerCollectives,
) -> tuple[Tensor, ...]:
    """Return the gradients of `backward` by differentiable operations.

    They are for double backward and for torch.func. Σ(x - mean) and Σ(x - mean)² of all ranks, around the
    mean of the forward pass, are functions of x by `_SumOverRanks`. The gradients take one collective, and
    their derivatives further ones: every rank must differentiate equally often.
    """
    if mask is not None:
        selected = select(dy, mask), select(x, mask)
        dx, *gradients = differentiable_gradients(*selected, None, weight, statistics, site)
        return put_back(dx, mask, x), *gradients
    with torch.enable_grad():
        moments = moments_of(statistics)
        # A rank that needs no gradient of x also takes part in the collectives of further derivatives.
        is_transformed = torch._C._are_functorch_transforms_active()
        values = x if x.requires_grad or is_transformed else x.detach().requires_grad_()
        dimensions = reduced_dimensions(x)
        count = moments.count.clamp(min=1)
        centred = values.to(torch.float64) - along_channels(moments.mean, x)
        local = torch.cat([centred.sum(dimensions), centred.square().sum(dimensions)])
        known = torch.cat([torch.zeros_like(moments.mean), moments.m2])
        mean, square = (_SumOverRanks.apply(local, statistics, site, known) / count).chunk(2)
        inverse = (square - mean.square() + statistics.eps).rsqrt()
        normalised = (centred - along_channels(mean, x)) * along_channels(inverse, x)
        dy = dy.to(torch.float64)
        bias_gradient, weight_gradient = dy.sum(dimensions), (dy * normalised).sum(dimensions)
        sums = _SumOverRanks.apply(torch.cat([bias_gradient, weight_gradient]), statistics, site, None)
        mean_dy, mean_dy_normalised = (sums / count).chunk(2)
        scale = inverse if weight is None else inverse * weight.to(torch.float64)
        dx = dy - along_channels(mean_dy, x) - normalised * along_channels(mean_dy_normalised, x)
        dx = (dx * along_channels(scale, x)).to(x.dtype)
    return dx, weight_gradient, bias_gradient
