"""Masks, and the share of the variance between workers."""

import pytest
import torch
import torch.distributed as dist

from syncbn import InputError, SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.counting import record_collectives


def normalise_masked(x, mask, gradient):
    rank = dist.get_rank()
    layer = SyncBatchNorm(3, dtype=torch.float64)
    own = x[rank].clone().requires_grad_()
    y = layer(own, mask[rank])
    y.backward(gradient[rank])
    return y.detach(), own.grad, layer.state_dict(), layer.eval()(own, mask[rank]).detach()


@pytest.mark.dist
def test_masked_values_count_nowhere():
    x, gradient = torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)
    mask = torch.rand(2, 4, 5) < 0.6
    mask[1, :] = False
    mask[1, 0, 0] = True
    plain = torch.nn.BatchNorm1d(3).double()
    kept = x.movedim(2, -1)[mask].requires_grad_()
    expected = plain(kept)
    expected.backward(gradient.movedim(2, -1)[mask])
    results = run_on_ranks(normalise_masked, 2, x, mask, gradient)
    y, dx, evaluated = (torch.stack([result[i] for result in results]).movedim(2, -1) for i in (0, 1, 3))
    torch.testing.assert_close(y[mask], expected.detach())
    torch.testing.assert_close(dx[mask], kept.grad)
    torch.testing.assert_close(evaluated[mask], plain.eval()(kept).detach())
    assert not y[~mask].any()
    assert not dx[~mask].any()
    assert not evaluated[~mask].any()
    for result in results:
        torch.testing.assert_close(result[2], plain.state_dict())


@pytest.mark.parametrize("mask", [torch.ones(4, 5), torch.ones(4, 3, 5, dtype=torch.bool), torch.ones(4) > 0])
def test_a_mask_of_another_shape_or_dtype_is_refused(mask):
    layer = SyncBatchNorm(3)
    with pytest.raises(InputError, match=r"taken is torch.bool of shape \(4, 5\)"):
        layer(torch.randn(4, 3, 5), mask)
    assert layer.num_batches_tracked == 0


def measure_share(dtype):
    layer = SyncBatchNorm(2)
    layer.measures_between_worker_variance = True
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=dtype)
    x[:, 0] += 10 * dist.get_rank()
    with record_collectives() as issued:
        layer(x)
    return layer.between_worker_variance_share, issued[0][1]


@pytest.mark.dist
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8 * (3 * 2 + 4)), (torch.float64, 8 * (2 * 2 + 4))])
def test_the_share_of_the_variance_between_ranks(dtype, size):
    for share, issued in run_on_ranks(measure_share, 2, dtype):
        assert share.tolist() == pytest.approx([25 / 26, 0])
        assert issued == size
    assert SyncBatchNorm(2).between_worker_variance_share is None
