import pytest
import torch
import torch.distributed as dist

from syncbn import InputError
from syncbn.collectives.context import LayerCollectives
from syncbn.passes import backward, forward, moments_of, put_back, select
from tests.dist import run_on_ranks


def run_passes(x, site, mask=None):
    """Run both passes without autograd; return y, dx, the gradients and the statistics."""
    y, statistics = forward(x, mask, None, None, 1e-5, site, None, keep_record=False)
    return y, *backward(torch.ones_like(x), x, mask, None, statistics, site), statistics


def test_a_mask_selects_values_and_puts_them_back():
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, False], [False, True]])
    values = select(x, mask)
    assert values.tolist() == [[0, 2, 4], [7, 9, 11]]
    assert torch.equal(put_back(values, mask, x), x * mask.unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_passes_of_one_process(dtype):
    x = torch.randn(6, 3, 4, dtype=dtype)
    y, dx, weight_gradient, bias_gradient, statistics = run_passes(x, LayerCollectives("norm"))
    assert (statistics.count, statistics.group) == (24, None)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(3, dtype=dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(dx, torch.zeros_like(x), rtol=0, atol=1e-5)  # a constant changes no output
    torch.testing.assert_close(weight_gradient.double(), y.double().sum((0, 2)), rtol=0, atol=1e-5)
    assert bias_gradient.tolist() == [24.0] * 3
    moments = moments_of(statistics)
    torch.testing.assert_close(moments.m2, statistics.variance * 24)


def test_a_single_value_is_refused():
    with pytest.raises(InputError, match="must have 2 or more values per channel"):
        run_passes(torch.ones(1, 3), LayerCollectives("norm"))


def run_on_a_rank():
    rank = dist.get_rank()
    x = torch.arange(6.0).view(3, 2)[: 3 - 3 * rank]
    y, dx, *_, statistics = run_passes(x, LayerCollectives("norm"))
    return y.shape, dx.shape, statistics.count, statistics.mean.tolist()


@pytest.mark.dist
def test_an_empty_rank_takes_part():
    full, empty = run_on_ranks(run_on_a_rank, 2)
    assert full == (torch.Size([3, 2]), torch.Size([3, 2]), 3.0, [2.0, 3.0])
    assert empty == (torch.Size([0, 2]), torch.Size([0, 2]), 3.0, [2.0, 3.0])
