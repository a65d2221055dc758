"""The GPU path over stand-ins for torch's kernels: formulas, dtypes and layouts, but not the device."""

import pytest
import torch
import torch.distributed as dist

from syncbn import sync_batch_norm
from tests.dist import run_on_ranks
from tests.syncbn.emulated_cuda import emulated_cuda
from tests.syncbn.reference import Case, expect, make_case, relative_error


def normalise(case):
    x = case.shards[dist.get_rank()].requires_grad_()
    weight = case.weight.requires_grad_()
    with emulated_cuda():
        y, moments = sync_batch_norm(x, weight, case.bias)
        y.backward(case.gradients[dist.get_rank()])
    return [tensor.detach() for tensor in (y, x.grad, weight.grad, moments.mean, moments.variance)]


def check(case, bound):
    expected = expect(case)
    for rank, (y, dx, _, mean, variance) in enumerate(run_on_ranks(normalise, len(case.shards), case)):
        assert relative_error(y, expected.outputs[rank]) <= bound
        assert relative_error(dx, expected.gradients[rank]) <= 5 * bound
        assert relative_error(mean, expected.mean) <= bound
        assert relative_error(variance, expected.variance) <= bound


BOUNDS = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]


@pytest.mark.dist
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("counts", [[4, 4], [5, 2], [3, 0]], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_rank_gets_what_one_device_computes(dtype, bound, counts, memory_format):
    case = make_case(counts, rest=(9, 11), dtype=dtype)
    case.shards = [shard.contiguous(memory_format=memory_format) for shard in case.shards]
    check(case, bound)


@pytest.mark.dist
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 0.25), (0.25, 0.25)], ids=str)
def test_a_channel_that_is_constant_on_a_rank(dtype, bound, values):
    """A dead channel, or one that differs between ranks alone, whose variance lies between them."""
    case = make_case([3, 2], rest=(4, 5), channels=6, dtype=dtype)
    for shard, value in zip(case.shards, values, strict=True):
        shard[:, 1] = value
    check(case, bound)


@pytest.mark.dist
@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("shape", [(1, 7), (1, 7, 1, 1)], ids=str)
def test_one_sample_a_rank(dtype, bound, shape):
    """Of two values every one is a deviation off the mean, so that dx almost vanishes, by cancellation: three are used."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(6)]
    case = Case(values[:3], values[3:], torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), 0.0)
    check(case, bound)
