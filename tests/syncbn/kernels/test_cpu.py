"""The fast passes on tensors that are large enough for them, to the bounds that the layer promises."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, sync_batch_norm
from syncbn.kernels import cpu as kernels
from tests.dist import run_on_ranks
from tests.syncbn.reference import expect, make_case, relative_error

LAYOUTS = {
    "rows": ((2, 40, 24, 12), torch.contiguous_format),
    "columns": ((2, 40, 24, 12), torch.channels_last),
    "one_dimension": ((200, 48), torch.contiguous_format),
    "odd": ((3, 5, 61, 47), torch.channels_last),
    "long": ((2, 2, 160, 160), torch.contiguous_format),
    "long_and_odd": ((1, 2, 513, 513), torch.contiguous_format),
    "long_and_prime": ((3, 2, 1, 8209), torch.contiguous_format),
}


def normalise(case, memory_format, options):
    rank = dist.get_rank()
    x = case.shards[rank].to(memory_format=memory_format).requires_grad_()
    layer = SyncBatchNorm(x.shape[1], momentum=1.0, **options)
    with torch.no_grad():
        layer.weight.copy_(case.weight)
        layer.bias.copy_(case.bias)
    y = layer(x)
    y.backward(case.gradients[rank].to(memory_format=memory_format))
    assert y.stride() == x.grad.stride() == x.stride()
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var


def run(layout, dtype, shift, options, world_size=2):
    shape, memory_format = LAYOUTS[layout]
    assert torch.Size(shape).numel() >= kernels.SMALL / 2
    case = make_case([shape[0] * 2] * (world_size - 1) + [shape[0]], shape[1], shape[2:], dtype, shift)
    return case, expect(case), run_on_ranks(normalise, world_size, case, memory_format, options)


@pytest.mark.parametrize(
    "shape", [(2, 3, 513, 513), (2, 2, 769, 769), (2, 2, 1026, 1026), (1, 2, 129, 129, 129)], ids=str
)
def test_sums_along_images_of_any_side_are_short(shape):
    x, dy = torch.randn(shape).add_(1).abs_(), torch.randn(shape)
    results = []
    for dtype, norm in (
        (torch.float32, SyncBatchNorm),
        (torch.float64, nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d),
    ):
        own, layer = x.detach().to(dtype).requires_grad_(), norm(shape[1], dtype=dtype)
        y = layer(own)
        y.backward(dy.to(dtype))
        results.append((y.detach(), own.grad, layer.running_var))
    for actual, exact, bound in zip(*results, (2e-6, 1e-5, 1e-6), strict=True):
        assert relative_error(actual, exact) <= bound


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shift", [0.0, 3.0, 100.0, 1e4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_large_tensors_are_as_exact_as_promised(layout, shift, dtype, bound):
    _, expected, results = run(layout, dtype, shift, {"dtype": dtype})
    parameter_gradients = [0, 0]
    for rank, (y, dx, weight_gradient, bias_gradient, mean, variance) in enumerate(results):
        assert relative_error(y, expected.outputs[rank]) <= bound
        assert relative_error(dx, expected.gradients[rank]) <= (1e-5 if dtype == torch.float32 else bound)
        # The mean is told apart from zero only as well as its dtype allows: by the larger of it and the
        # deviation.
        scale = expected.mean.abs().max() + expected.variance.max().sqrt()
        assert (mean.double() - expected.mean).abs().max() <= (
            1e-6 if dtype == torch.float32 else bound
        ) * scale
        unbiased = expected.variance * expected.count / (expected.count - 1)
        assert relative_error(variance, unbiased) <= (1e-6 if shift < 1e4 else 1.2e-5)
        assert torch.equal(mean, results[0][4])
        assert torch.equal(variance, results[0][5])
        parameter_gradients = [
            parameter_gradients[0] + weight_gradient,
            parameter_gradients[1] + bias_gradient,
        ]
    assert relative_error(parameter_gradients[0], expected.weight_gradient) <= 5 * bound
    assert relative_error(parameter_gradients[1], expected.bias_gradient) <= 5 * bound


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_half_precision_tensors_are_within_one_unit_in_the_last_place(layout, dtype):
    case, _, results = run(layout, dtype, 0.0, {})
    expected = expect(case)
    for rank, (y, dx, *_) in enumerate(results):
        for actual, exact in ((y, expected.outputs[rank]), (dx, expected.gradients[rank])):
            # Half a unit is what rounding alone takes; below the smallest normal number units are as large as
            # there.
            unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
            assert ((actual.double() - exact).abs() <= 0.51 * unit).all()


def test_one_far_channel_is_done_again_and_the_others_are_not(monkeypatch):
    x = torch.randn(4, 6, 30, 30)
    x[:, 2] += 1e3
    x[:, 4] = 7.0
    sizes = []
    exactly = kernels.measure
    monkeypatch.setattr(kernels, "measure", lambda part: sizes.append(part.shape[1]) or exactly(part))
    y, moments = sync_batch_norm(x)
    assert sizes == [2]
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.variance, variance, rtol=1e-6, atol=1e-9)
    assert moments.variance[4] == 0
    assert (
        relative_error(y, (x.double() - mean.view(1, -1, 1, 1)) * (variance.view(1, -1, 1, 1) + 1e-5).rsqrt())
        < 2e-6
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_channel(memory_format, value):
    x = torch.randn(4, 6, 30, 30).to(memory_format=memory_format)
    x[1, 3, 5, 5] = value
    y, _ = sync_batch_norm(x)
    assert y[:, 3].isnan().all()
    assert y[:, [0, 1, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("gradient_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_may_come_in_another_memory_format(memory_format, gradient_format):
    x, dy = torch.randn(2, 4, 6, 30, 30)
    gradients = []
    for formats in ((torch.contiguous_format,) * 2, (memory_format, gradient_format)):
        values = x.clone(memory_format=formats[0]).requires_grad_()
        sync_batch_norm(values)[0].backward(dy.to(memory_format=formats[1]))
        gradients.append(values.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert gradients[1].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("parameter_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "columns", "one_dimension"])
def test_the_output_has_the_dtype_of_the_input_not_of_the_parameters(layout, dtype, parameter_dtype):
    shape, memory_format = LAYOUTS[layout]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    layer = SyncBatchNorm(shape[1], dtype=parameter_dtype)
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, parameter_dtype)


def test_a_default_dtype_changes_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        layer = SyncBatchNorm(40, dtype=torch.float32)
        assert layer(torch.randn(2, 40, 24, 12, dtype=torch.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_around_a_large_mean_are_as_exact(memory_format):
    torch.manual_seed(0)
    x = torch.randn(8, 16, 64, 64).contiguous(memory_format=memory_format).requires_grad_()
    dy = 1 + 0.01 * torch.randn(8, 16, 64, 64).contiguous(memory_format=memory_format)
    exact = x.detach().double().requires_grad_()
    sync_batch_norm(x)[0].backward(dy)
    torch.nn.functional.batch_norm(exact, None, None, training=True).backward(dy.double())
    assert relative_error(x.grad, exact.grad) <= 1e-5
