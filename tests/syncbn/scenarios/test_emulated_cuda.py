"""The GPU path on two ranks, over stand-ins for torch's kernels and with Triton's in its interpreter:
formulas, dtypes, layouts and launches, but not the device.
"""

import copy
import time
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import DesyncError, GroupError, InputError, SyncBatchNorm
from syncbn.collectives.watchdog import watch
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives
from tests.syncbn.emulated_cuda import emulated_cuda
from tests.syncbn.launch_counter import LaunchCounter
from tests.syncbn.reference import Case, expect, make_case, relative_error

pytestmark = pytest.mark.dist
PACKINGS = ["triton", "vectors"]
LAYOUTS = {
    "rows": ((9, 11), lambda x: x.contiguous()),
    "channels_last": ((9, 11), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((3, 5, 4), lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    "vectors": ((), lambda x: x.contiguous()),
    "sequences": ((13,), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "view": ((9, 11), lambda x: torch.stack([x, x], dim=-1)[..., 0]),
}
# Largest error of y, of dx, and of the gradients of the parameters, as a fraction of the largest value.
BOUNDS = {
    torch.float64: (1e-12, 1e-12, 1e-12),
    torch.float32: (2e-6, 1e-5, 1e-5),
    torch.bfloat16: (4e-3, 4e-3, 1e-5),
    torch.float16: (5e-4, 5e-4, 1e-5),
}
BUFFER_BOUND = 1e-6


def train(case, layout="rows", packing="triton", queued=True, **options):
    """Train one step; return y, dx, the gradients of the parameters, and the buffers."""
    arrange = LAYOUTS[layout][1]
    rank = dist.get_rank()
    layer = SyncBatchNorm(case.weight.numel(), **options)
    layer.layer_name = "norm"
    for parameter, values in ((layer.weight, case.weight), (layer.bias, case.bias)):
        if parameter is not None:
            parameter.data.copy_(values)
    with emulated_cuda(packing, queued):
        x = arrange(case.shards[rank].clone()).detach().requires_grad_()
        y = layer(x)
        y.backward(arrange(case.gradients[rank]))
    if layout != "view" and 1 not in x.shape:
        assert y.stride() == x.grad.stride() == x.stride()
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [tensor.detach() for tensor in (y, x.grad, *gradients, *layer.buffers())]


def train_all(settings):
    return [train(*arguments, **options) for arguments, options in settings]


def check(results, case, bounds, momentum=0.1):
    """Compare with one device, and the buffers between ranks."""
    expected = expect(case)
    y_bound, dx_bound, parameter_bound = bounds
    totals = [0, 0]
    for rank, (y, dx, weight_gradient, bias_gradient, *buffers) in enumerate(results):
        assert y.dtype == dx.dtype == case.shards[rank].dtype
        assert relative_error(y, expected.outputs[rank]) <= y_bound
        assert relative_error(dx, expected.gradients[rank]) <= dx_bound
        totals = [totals[0] + weight_gradient, totals[1] + bias_gradient]
        mean, variance, batches = buffers
        unbiased = expected.variance * expected.count / (expected.count - 1)
        assert relative_error(mean, momentum * expected.mean) <= max(
            BUFFER_BOUND, dx_bound * (case.shift > 1e3)
        )
        # Of a mean 1e4 deviations from zero Welford's pass in float32 leaves the variance four digits.
        assert relative_error(variance, 1 - momentum + momentum * unbiased) <= (
            BUFFER_BOUND if case.shift < 1e3 else 1e-4
        )
        assert batches == 1
        for one, other in zip(buffers, results[0][4:], strict=True):
            assert torch.equal(one, other)
    assert relative_error(totals[0], expected.weight_gradient) <= parameter_bound
    assert relative_error(totals[1], expected.bias_gradient) <= parameter_bound


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_rank_gets_what_one_device_computes(dtype, layout, packing):
    cases = [make_case(counts, rest=LAYOUTS[layout][0], dtype=dtype) for counts in ([6, 6], [5, 2], [7, 0])]
    options = {"dtype": torch.float64 if dtype == torch.float64 else None}
    settings = [((case, layout, packing, queued), options) for case in cases for queued in (True, False)]
    results = run_on_ranks(train_all, 2, settings)
    for index, ((case, *_), _) in enumerate(settings):
        check([result[index] for result in results], case, BOUNDS[dtype])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("shift", "bounds"),
    # Welford's mean is float32, of which half a unit is 3e-4 deviations at 1e4.
    [(10.0, (2e-6, 1e-5, 1e-5)), (100.0, (1e-5, 2e-5, 2e-5)), (1e4, (1e-3, 2e-3, 3e-3))],
)
def test_a_mean_many_deviations_from_zero(shift, bounds, packing):
    settings = [
        ((make_case([8, 5], rest=(9, 11), dtype=torch.float32, shift=shift), layout, packing), {})
        for layout in ("rows", "channels_last")
    ]
    results = run_on_ranks(train_all, 2, settings)
    for index, ((case, *_), _) in enumerate(settings):
        check([result[index] for result in results], case, bounds)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 0.25), (0.25, 0.25)], ids=str)
def test_a_channel_that_is_constant_on_a_rank(dtype, values, packing):
    """A dead channel, or one that differs between ranks alone, whose variance lies between them."""
    case = make_case([3, 2], rest=(4, 5), channels=6, dtype=dtype)
    for shard, value in zip(case.shards, values, strict=True):
        shard[:, 1] = value
    options = {"dtype": torch.float64 if dtype == torch.float64 else None}
    check(run_on_ranks(run_one, 2, case, packing, options), case, BOUNDS[dtype])


def run_one(case, packing, options, queued=True):
    return train(case, "rows", packing, queued, **options)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (1, 7, 1, 1)], ids=str)
def test_one_value_a_channel_and_rank(dtype, shape, packing):
    """As after global pooling with one sample a rank. Of two values each is one deviation from the mean, so
    that
    dx almost vanishes by cancellation: its error is compared with dy.
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    one = torch.ones(7, dtype=torch.float64)
    case = Case(values[:2], values[2:], one, 0 * one, 0.0)
    options = {"dtype": torch.float64 if dtype == torch.float64 else None}
    expected = expect(case)
    for rank, (y, dx, *_) in enumerate(run_on_ranks(run_one, 2, case, packing, options)):
        assert relative_error(y, expected.outputs[rank]) <= BOUNDS[dtype][0]
        error = (dx.double() - expected.gradients[rank]).abs().max()
        assert error <= BOUNDS[dtype][1] * 10 * case.gradients[rank].abs().max()


def run_nothing(packing, queued):
    results = []
    for dtype in (torch.float32, torch.float64):
        layer = SyncBatchNorm(3, dtype=dtype)
        before = copy.deepcopy(layer.state_dict())
        with emulated_cuda(packing, queued):
            x = torch.randn(0, 3, 4, dtype=dtype, requires_grad=True)
            layer(x).sum().backward()
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        results.append((x.grad.shape, layer.weight.grad))
        with emulated_cuda(packing, queued), pytest.raises(InputError, match="2 or more values per channel"):
            layer(torch.randn(1 - dist.get_rank(), 3, dtype=dtype))
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    return results


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_without_values_nothing_changes_and_one_value_is_refused_everywhere(packing, queued):
    for results in run_on_ranks(run_nothing, 2, packing, queued):
        for shape, gradient in results:
            assert shape == (0, 3, 4)
            assert not gradient.any()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype, layout, packing):
    case = make_case([6, 3], rest=LAYOUTS[layout][0], dtype=dtype)
    case.weight, case.bias = (vector.to(dtype).double() for vector in (case.weight, case.bias))
    expected, bound = expect(case), BOUNDS[dtype][0]
    results = run_on_ranks(train_all, 2, [((case, layout, packing), {"dtype": dtype})])
    for rank, [(y, dx, weight_gradient, _, *_)] in enumerate(results):
        assert (y.dtype, dx.dtype, weight_gradient.dtype) == (dtype, dtype, dtype)
        assert relative_error(y, expected.outputs[rank]) <= bound
        assert relative_error(dx, expected.gradients[rank]) <= bound
    # Each rank rounds its share.
    for index, gradient in ((2, expected.weight_gradient), (3, expected.bias_gradient)):
        assert relative_error(sum(rank[0][index].double() for rank in results), gradient) <= 2 * bound


@pytest.mark.parametrize("packing", PACKINGS)
def test_without_parameters_with_equal_weights_and_without_buffers(packing):
    case = make_case([4, 3], rest=(9, 11), dtype=torch.float32)
    case.weight, case.bias = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    settings = [
        ((case, "rows", packing), options)
        for options in (
            {"affine": False},
            {"momentum": None},
            {"track_running_stats": False},
            {"bias": False},
        )
    ]
    expected = expect(case)
    for rank, results in enumerate(run_on_ranks(train_all, 2, settings)):
        for result in results:
            assert relative_error(result[0], expected.outputs[rank]) <= 2e-6
            assert relative_error(result[1], expected.gradients[rank]) <= 1e-5
        assert [len(result) for result in results] == [5, 7, 4, 6]
        assert (
            relative_error(results[1][4], expected.mean) <= BUFFER_BOUND
        )  # the only batch has all the weight


def run_with_buffers_of_a_larger_tensor(packing):
    results = []
    for is_emulated in (True, False):
        layer = SyncBatchNorm(3)
        layer.layer_name = "norm"
        both = torch.tensor([[0.0, 1.0]] * 3)
        layer.running_mean, layer.running_var = both.unbind(1)
        generator = torch.Generator().manual_seed(dist.get_rank())
        with emulated_cuda(packing, True, enabled=is_emulated):
            layer(torch.randn(4, 3, generator=generator))
        results.append(both)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packing", PACKINGS)
def test_buffers_may_be_views_with_strides(packing):
    run_on_ranks(run_with_buffers_of_a_larger_tensor, 2, packing)


def run_with_mask(packing):
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(4, 3, 6, 5, generator=generator) + dist.get_rank()
    mask = torch.rand(4, 6, 5, generator=generator) < (0.6 if dist.get_rank() == 0 else 0.0)
    results = []
    for is_emulated in (True, False):
        layer, values = SyncBatchNorm(3), x.clone().requires_grad_()
        layer.layer_name = "norm"
        with emulated_cuda(packing, True, enabled=is_emulated):
            y = layer(values, mask)
            y.square().sum().backward()
        results.append([y.detach(), values.grad, layer.weight.grad, *layer.buffers()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_mask_that_leaves_one_rank_without_values(packing):
    run_on_ranks(run_with_mask, 2, packing)


def run_twice_differentiated(packing):
    gradients = []
    for is_emulated in (True, False):
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
        layer = SyncBatchNorm(3, dtype=torch.float64)
        layer.layer_name = "norm"
        with emulated_cuda(packing, True, enabled=is_emulated):
            (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
            first.square().sum().backward()
        gradients.append([first.detach(), x.grad, layer.weight.grad])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_second_derivative_is_that_of_the_cpu(packing):
    run_on_ranks(run_twice_differentiated, 2, packing)


def make_block():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4), nn.ReLU(), SyncBatchNorm(4, momentum=None))
    for number in (1, 3):
        block[number].layer_name = f"norm{number}"
    return block


def run_block(call, block, packing, is_emulated=True):
    x = torch.randn(3, 3, 5, 6, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    with emulated_cuda(packing, True, enabled=is_emulated), record_collectives() as issued:
        y = call(x)
        (y * y.detach().cos()).sum().backward()
    gradients = [parameter.grad for parameter in block.parameters()]
    return [y.detach(), x.grad, *gradients, *block.buffers()], issued


def run_checkpointed(packing, use_reentrant):
    plain, block = make_block(), make_block()
    expected, issued = run_block(plain, plain, packing, is_emulated=False)
    actual, again = run_block(lambda x: checkpoint(block, x, use_reentrant=use_reentrant), block, packing)
    assert again == issued
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_checkpoint_exchanges_and_updates_nothing_again(packing, use_reentrant):
    run_on_ranks(run_checkpointed, 2, packing, use_reentrant)


def run_compiled(packing, is_checkpointed):
    plain, block = make_block(), make_block()
    expected, issued = run_block(plain, plain, packing, is_emulated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        call = (lambda x: checkpoint(compiled, x, use_reentrant=False)) if is_checkpointed else compiled
        actual, again = run_block(call, block, packing)
    torch._dynamo.reset()
    assert again == issued
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_compiled_block_on_a_queued_backend(packing, is_checkpointed):
    run_on_ranks(run_compiled, 2, packing, is_checkpointed)


def run_compiled_sequence(packing):
    layer = SyncBatchNorm(6)
    x = torch.randn(4, 9, 6).transpose(1, 2).detach().requires_grad_()
    with emulated_cuda(packing, True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(layer, backend="inductor", fullgraph=True)(x)
        y.square().sum().backward()
    torch._dynamo.reset()
    return x.stride(), y.stride(), x.grad.stride()


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_compiler_gets_the_strides_it_was_promised(packing):
    for x, y, dx in run_on_ranks(run_compiled_sequence, 2, packing, timeout_seconds=200):
        assert x == y == dx


def run_with_share(packing, dtype):
    shares = []
    for is_emulated in (True, False):
        layer = SyncBatchNorm(3, dtype=dtype)
        layer.layer_name, layer.track_between_rank_variance = "norm", True
        generator = torch.Generator().manual_seed(dist.get_rank())
        with emulated_cuda(packing, True, enabled=is_emulated):
            layer(torch.randn(4, 3, 5, generator=generator).to(dtype) + dist.get_rank())
        shares.append(layer.between_worker_variance_share)
    torch.testing.assert_close(*shares, rtol=1e-5, atol=1e-6)
    return shares[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_variance_between_ranks_is_that_of_the_cpu(packing, dtype):
    for share in run_on_ranks(run_with_share, 2, packing, dtype):
        assert ((share > 0.01) & (share < 0.9)).all()


def count_launches(packing, queued, dtype, parameter_dtype):
    """Return the launches and the operators that read a value, of the second step."""
    layer = SyncBatchNorm(5, dtype=parameter_dtype)
    layer.layer_name = "norm"
    x = torch.randn(4, 5, 6, 7).to(dtype).requires_grad_()
    dy = torch.randn(4, 5, 6, 7).to(dtype)
    with emulated_cuda(packing, queued):
        layer(x).backward(dy)
        layer.weight.grad = layer.bias.grad = x.grad = None
        with LaunchCounter() as forward:
            y = layer(x)
        with LaunchCounter() as backward:
            y.backward(dy)
    return [(counter.launches, counter.host_waits) for counter in (forward, backward)]


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(dtype, torch.promote_types(dtype, torch.float32)) for dtype in BOUNDS]
    + [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
@pytest.mark.parametrize(("packing", "limits"), [("triton", (5, 5)), ("vectors", (24, 21))])
def test_a_layer_takes_few_launches_and_the_host_waits_for_none(packing, limits, dtype, parameter_dtype):
    if packing == "vectors" and dtype == torch.float64:
        limits = (37, 18)  # the vectors of the ranks are merged one by one
    if packing == "vectors" and parameter_dtype in (torch.bfloat16, torch.float16):
        limits = (25, 22)  # the mean and the weight are converted
    for counts in run_on_ranks(count_launches, 2, packing, True, dtype, parameter_dtype):
        for (launches, waits), limit in zip(counts, limits, strict=True):
            assert len(launches) <= limit, launches
            assert waits == []


def mispair(packing):
    """Give the ranks layers of different names on a queued backend; return the error of a later call."""
    layer = SyncBatchNorm(3)
    layer.layer_name = f"norm{dist.get_rank()}"
    with emulated_cuda(packing, True):
        deadline = time.monotonic() + 20
        layer(torch.randn(4, 3))
        while time.monotonic() < deadline:
            try:
                watch.raise_failure()
            except DesyncError as error:
                return str(error)
            time.sleep(0.05)
    return "nothing"


@pytest.mark.parametrize("packing", PACKINGS)
def test_mispaired_calls_are_found_on_the_device(packing):
    for rank, message in enumerate(run_on_ranks(mispair, 2, packing)):
        assert f"layer 'norm{rank}', forward, call 1: the collective is paired with another call" in message
        assert f"Ranks not in this call: [{1 - rank}]" in message


def capture(packing):
    layer = SyncBatchNorm(3)
    with (
        emulated_cuda(packing, True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(GroupError, match="a CUDA graph cannot capture synchronised statistics"),
    ):
        layer(torch.randn(4, 3))


def test_a_cuda_graph_is_refused_by_name():
    run_on_ranks(capture, 2, "triton")
