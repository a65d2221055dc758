"""What one device computes on the concatenated batch, in float64: the yardstick of the layer's tests."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Case:
    """Each rank's values and the gradients of their outputs, around a mean that is exact in their dtype."""

    shards: list[Tensor]
    gradients: list[Tensor]
    weight: Tensor
    bias: Tensor
    shift: float


@dataclass
class Expected:
    """Outputs and gradients by rank, and the statistics of all ranks, in float64."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    weight_gradient: Tensor
    bias_gradient: Tensor
    mean: Tensor
    variance: Tensor
    count: int


def make_case(
    counts: list[int],
    channels: int = 5,
    rest: tuple[int, ...] = (3, 4),
    dtype: torch.dtype = torch.float64,
    shift: float = 0.0,
    seed: int = 0,
) -> Case:
    """Draw `counts[r]` samples for rank r; channels differ in spread and the ranks in mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spread = torch.linspace(1.0, 2.0, channels, dtype=torch.float64).view(1, -1, *(1,) * len(rest))
    shards = [
        ((draw(count, channels, *rest) + 0.3 * rank) * spread + shift).to(dtype)
        for rank, count in enumerate(counts)
    ]
    gradients = [draw(count, channels, *rest).to(dtype) for count in counts]
    # Parameters that float32 holds too: what is lost in rounding them is not the layer's.
    weight, bias = (
        vector.to(torch.float32).to(torch.float64) for vector in (1 + 0.3 * draw(channels), draw(channels))
    )
    return Case(shards, gradients, weight, bias, shift)


def expect(case: Case, eps: float = 1e-5) -> Expected:
    """Compute batch normalisation of the concatenated shards on one device.

    The shift is taken off first, exactly, since torch's own kernels would lose digits to it.
    """
    counts = [shard.shape[0] for shard in case.shards]
    x = (torch.cat(case.shards).to(torch.float64) - case.shift).requires_grad_()
    weight, bias = (
        vector.detach().clone().to(torch.float64).requires_grad_() for vector in (case.weight, case.bias)
    )
    dimensions = (0, *range(2, x.dim()))
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    y.backward(torch.cat(case.gradients).to(torch.float64))
    variance, mean = torch.var_mean(x.detach(), dimensions, correction=0)
    return Expected(
        outputs=list(y.detach().split(counts)),
        gradients=list(x.grad.split(counts)),
        weight_gradient=weight.grad,
        bias_gradient=bias.grad,
        mean=mean + case.shift,
        variance=variance,
        count=x.numel() // x.shape[1],
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation as a fraction of the largest value expected; 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0
    return ((actual.to(torch.float64) - expected).abs().max() / expected.abs().max()).item()
