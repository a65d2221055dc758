"""As many ranks as machines have GPUs: every promise of precision at once, in one spawn."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.reference import make_case, relative_error

pytestmark = pytest.mark.dist
# Uneven and one empty. Some shares are large enough for the fast passes and some are not.
COUNTS = [3, 1, 0, 5, 2, 8, 7, 6]
CHANNELS, REST = 6, (24, 20)
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make_layer(norm, case, dtype):
    # A momentum of 1 shows the newest statistics undiluted.
    layer = norm(CHANNELS, momentum=1.0, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(case.weight)
        layer.bias.copy_(case.bias)
    return layer


def normalise(cases):
    """Run each case in both memory formats; return output, input gradient and buffers."""
    rank, results = dist.get_rank(), []
    for case in cases:
        for memory_format in FORMATS:
            x = case.shards[rank].to(memory_format=memory_format, copy=True).requires_grad_()
            layer = make_layer(SyncBatchNorm, case, torch.promote_types(x.dtype, torch.float32))
            y = layer(x)
            y.backward(case.gradients[rank].to(memory_format=memory_format))
            assert y.is_contiguous(memory_format=memory_format)
            assert x.grad.is_contiguous(memory_format=memory_format)
            results.append((y.detach(), x.grad, list(layer.buffers())))
    return results


def expect(case):
    """Let nn.BatchNorm2d normalise the concatenated batch in float64."""
    x = torch.cat(case.shards).double().requires_grad_()
    layer = make_layer(nn.BatchNorm2d, case, torch.float64)
    y = layer(x)
    y.backward(torch.cat(case.gradients).double())
    return y.detach(), x.grad, list(layer.buffers())


def unit_in_the_last_place(exact, dtype):
    _, exponent = torch.frexp(exact)
    return torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), exponent - 1)


def check(results, expected):
    """Compare what the ranks have, put together, with one device's: float64, float32 or half precision by its
    dtype.
    """
    y, dx = (torch.cat([result[index] for result in results]) for index in range(2))
    dtype, error = y.dtype, (y.double() - expected[0]).abs()
    match dtype:
        case torch.float64:
            assert error.max() <= 1e-12
            assert (dx - expected[1]).abs().max() <= 1e-12
        case torch.float32:
            assert error.max() <= 2e-6
            assert relative_error(dx, expected[1]) <= 1e-5
        case _:
            assert (error <= unit_in_the_last_place(expected[0], dtype)).all()
            assert ((dx.double() - expected[1]).abs() <= unit_in_the_last_place(expected[1], dtype)).all()
    for _, _, buffers in results:
        for one, first, exact in zip(buffers, results[0][2], expected[2], strict=True):
            assert torch.equal(one, first), "the buffers differ in bits between ranks"
            bound = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(one.double(), exact.double(), rtol=bound, atol=0)


def test_eight_ranks_are_as_exact_as_promised():
    cases = [make_case(COUNTS, CHANNELS, REST, dtype) for dtype in DTYPES]
    results = run_on_ranks(normalise, len(COUNTS), cases)
    for index, case in enumerate(cases):
        for number, _ in enumerate(FORMATS):
            check([result[len(FORMATS) * index + number] for result in results], expect(case))
