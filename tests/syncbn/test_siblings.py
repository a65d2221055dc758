"""Layers that share a message, against the same layers one by one."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import DesyncError, GroupError, InputError, SyncBatchNorm, apply_together
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives
from tests.syncbn.emulated_cuda import emulated_cuda
from tests.syncbn.launch_counter import LaunchCounter

SHAPES = [(4, 3, 5, 6), (4, 7), (2, 40, 16, 16)]


def make_layers(dtype=None):
    layers = [SyncBatchNorm(shape[1], dtype=dtype, affine=shape[1] != 7) for shape in SHAPES]
    for number, layer in enumerate(layers):
        layer.layer_name = f"norm{number}"
    return layers


def draw(dtype=torch.float32, is_empty=False):
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    xs = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    xs[2] = xs[2].to(memory_format=torch.channels_last)
    return [x[:0] if is_empty else x for x in xs]


def one_by_one(layers, xs):
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


def run(apply, layers, xs):
    xs = [x.clone().requires_grad_() for x in xs]
    with record_collectives() as issued:
        ys = apply(layers, xs)
        sum((y * y.detach().cos()).sum() for y in ys).backward()
    tensors = [parameter.grad for layer in layers for parameter in layer.parameters()]
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    return [*(y.detach() for y in ys), *(x.grad for x in xs), *tensors, *buffers], issued


def compare(dtype, emptied, packing):
    apart = make_layers()
    together = copy.deepcopy(apart)
    for number, layer in enumerate(together):
        layer.layer_name = f"norm{number}"
    xs = draw(dtype, is_empty=dist.get_rank() == emptied)
    for _ in range(2):
        with emulated_cuda(packing or "vectors", True, enabled=packing is not None):
            expected, issued_apart = run(one_by_one, apart, xs)
            actual, issued = run(apply_together, together, xs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    return issued_apart, issued


@pytest.mark.dist
@pytest.mark.parametrize("packing", [None, "triton", "vectors"])
@pytest.mark.parametrize("emptied", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_share_one_message_each_way_and_give_the_same_bits(dtype, emptied, packing):
    for apart, together in run_on_ranks(compare, 2, dtype, emptied, packing):
        assert len(apart) == 6
        assert len(together) == 2
        assert sum(size for _, size in together) == sum(size for _, size in apart)


def share_and_checkpoint(use_reentrant):
    apart, together = make_layers(), make_layers()
    expected, _ = run(one_by_one, apart, draw())

    def call(layers, xs):
        return checkpoint(lambda *xs: tuple(apply_together(layers, xs)), *xs, use_reentrant=use_reentrant)

    actual, issued = run(call, together, draw())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return len(issued)


@pytest.mark.dist
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_exchanges_nothing_again(use_reentrant):
    assert run_on_ranks(share_and_checkpoint, 2, use_reentrant) == [2, 2]


def checkpoint_one_layer_twice():
    layer = SyncBatchNorm(3)
    xs = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    with record_collectives() as issued:
        ys = checkpoint(lambda *xs: tuple(apply_together([layer, layer], xs)), *xs, use_reentrant=False)
        sum(y.square().sum() for y in ys).backward()
    return len(issued), layer.num_batches_tracked.item()


@pytest.mark.dist
def test_a_layer_may_be_its_own_sibling():
    assert run_on_ranks(checkpoint_one_layer_twice, 2) == [(2, 2)] * 2


def differentiate_twice():
    results = []
    for apply in (one_by_one, apply_together):
        layers, xs = make_layers(), [x.requires_grad_() for x in draw()]
        total = sum(y.pow(3).sum() for y in apply(layers, xs))
        gradients = torch.autograd.grad(total, xs, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        results.append([x.grad for x in xs])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


@pytest.mark.dist
def test_the_second_derivative_is_that_of_the_layers():
    run_on_ranks(differentiate_twice, 2)


def mispair():
    layers = make_layers()[:2]
    if dist.get_rank() == 1:
        layers[1].layer_name = "another"
    with pytest.raises(
        DesyncError, match=r"layer '(norm1|another)', forward, call 1: .* paired with another call"
    ):
        apply_together(layers, draw()[:2])


@pytest.mark.dist
def test_a_layer_in_another_call_is_named():
    run_on_ranks(mispair, 2)


def apply_one_by_one(kind):
    layers, xs = make_layers(torch.float64 if kind == "float64" else None), draw()
    if kind == "float64":
        xs = [x.double() for x in xs]
    elif kind == "evaluation":
        for layer in layers:
            layer.eval()
    elif kind == "one":
        layers, xs = layers[:1], xs[:1]
    expected = one_by_one(copy.deepcopy(nn.ModuleList(layers)), xs)
    with record_collectives() as issued:
        torch.testing.assert_close(apply_together(layers, xs), expected, rtol=0, atol=0)
    return len(issued)


@pytest.mark.dist
@pytest.mark.parametrize(("kind", "collectives"), [("float64", 3), ("evaluation", 0), ("one", 1)])
def test_layers_that_cannot_share_are_applied_one_by_one(kind, collectives):
    assert run_on_ranks(apply_one_by_one, 2, kind) == [collectives] * 2


def test_one_process_applies_the_layers():
    apart, together = make_layers(), make_layers()
    assert [y.shape for y in apply_together(together, draw())] == [torch.Size(shape) for shape in SHAPES]
    torch.testing.assert_close(one_by_one(apart, draw()), apply_together(make_layers(), draw()))


def refuse():
    layers, xs = make_layers(), draw()
    with pytest.raises(InputError, match="must have one element per channel"):
        apply_together(layers[:2], [xs[1], xs[1]])
    layers[1].process_group = dist.new_group([0, 1])
    with pytest.raises(GroupError, match="layers: must have the same process group"):
        apply_together(layers, xs)
    with pytest.raises(ValueError, match="zip"):
        apply_together(layers, xs[:1])


@pytest.mark.dist
def test_bad_arguments_are_refused_before_a_collective():
    run_on_ranks(refuse, 2)


def count():
    layers, xs = make_layers()[::2], [x.requires_grad_() for x in draw()[::2]]
    with emulated_cuda("triton", True):
        with LaunchCounter() as forward:
            ys = apply_together(layers, xs)
        total = sum(y.sum() for y in ys)
        with LaunchCounter() as backward:
            total.backward()
    return len(forward.launches), forward.host_waits + backward.host_waits


@pytest.mark.dist
def test_two_siblings_on_a_gpu_take_ten_launches():
    """Two by four for the layers, one to join the vectors and one collective."""
    assert run_on_ranks(count, 2) == [(10, [])] * 2
