"""Masks, and the share of the variance between workers."""

import pytest
import torch
import torch.distributed as dist

from syncbn import InputError, SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives


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


@pytest.mark.parametrize("tracked", [True, False])
def test_masked_values_count_nowhere_in_evaluation(tracked):
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.6
    x.movedim(1, -1)[~mask] = torch.nan
    layer = SyncBatchNorm(3, track_running_stats=tracked).eval()
    y = layer(x, mask).movedim(1, -1)
    y.square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.bias.grad.isfinite().all()
    torch.testing.assert_close(y[mask], layer(x.movedim(1, -1)[mask]))
    assert not y[~mask].any()


def test_a_masked_gradient_can_be_differentiated_in_its_turn():
    layer = SyncBatchNorm(2, dtype=torch.float64, track_running_stats=False)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True]]).expand(4, 3)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), (x,))


@pytest.mark.dist
def test_a_mask_is_part_of_the_compiled_graph():
    run_on_ranks(compile_with_mask, 2)


def compile_with_mask():
    x, gradient = torch.randn(2, 6, 3, 5)
    mask = torch.rand(6, 5) < 0.3 + 0.5 * dist.get_rank()
    results = []
    for whole in (False, True):
        layer = SyncBatchNorm(3)
        layer.layer_name = "masked"
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if whole else layer
        own = x.clone().requires_grad_()
        y = call(own, mask)
        y.backward(gradient)
        results.append((y.detach(), own.grad, layer.weight.grad, *layer.buffers()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("mask", [torch.ones(4, 5), torch.ones(4, 3, 5, dtype=torch.bool), torch.ones(4) > 0])
def test_a_mask_of_another_shape_or_dtype_is_refused(mask):
    layer = SyncBatchNorm(3)
    with pytest.raises(InputError, match=r"mask: must be torch.bool of shape \(4, 5\)"):
        layer(torch.randn(4, 3, 5), mask)
    assert layer.num_batches_tracked == 0


def measure_share(dtype):
    layer = SyncBatchNorm(2)
    layer.track_between_rank_variance = True
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=dtype)
    x[:, 0] += 10 * dist.get_rank()
    with record_collectives() as issued:
        layer(x)
    return layer.between_worker_variance_share, issued[0][1]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 8 * (3 * 2 + 2)), (torch.float64, 8 * (2 * 2 + 2))]
)
def test_the_share_of_the_variance_between_ranks(dtype, size):
    for share, issued in run_on_ranks(measure_share, 2, dtype):
        assert share.tolist() == pytest.approx([25 / 26, 0])
        assert issued == size
    assert SyncBatchNorm(2).between_worker_variance_share is None
