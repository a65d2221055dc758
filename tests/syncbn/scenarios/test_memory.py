"""The memory of both passes beside that of plain batch normalisation, on tensors against which the rest is
small.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from syncbn import SyncBatchNorm
from tests.dist import run_on_ranks

SHAPE = (16, 64, 80, 80)  # 25 MiB in float32
BOUND = 1.01
FORMATS = [torch.contiguous_format, torch.channels_last]


VOLUME = (1, 16, 64, 80, 80)
"""One sample, as of medical images; as large."""


def trace_bytes(function):
    """Call a function; return what it made and left behind, and the most it held at one time, both in bytes.

    They are what torch's allocator gave and took back, so what kernels need for a moment counts too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's own parts
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result  # only now, so that it counts as left behind
    return held, peak


def measure_layer(norm, memory_format, shift, dtype=torch.float32, far=slice(None), shape=SHAPE):
    """Return the bytes that forward keeps, output included and input not, and the peak of forward and
    backward.
    """
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format) for _ in range(2))
    x[:, far] += shift
    x.requires_grad_()
    layer = norm(shape[1], dtype=torch.promote_types(dtype, torch.float32))
    # Gradients are handed out, not added to x.grad, where autograd would copy some and not others.
    inputs = (x, *layer.parameters())
    kept, _ = trace_bytes(lambda: layer(x))
    _, peak = trace_bytes(lambda: torch.autograd.grad(layer(x), inputs, dy))
    return kept, peak


def measure_both(memory_format, shift, plain=nn.BatchNorm2d, **options):
    return [measure_layer(norm, memory_format, shift, **options) for norm in (plain, SyncBatchNorm)]


def check_bounds(plain, synchronised):
    kept, peak = plain
    assert kept >= torch.Size(SHAPE).numel() * 2, "the output is not among what was traced"
    assert synchronised[0] <= BOUND * kept
    assert synchronised[1] <= BOUND * peak


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_rank_alone_needs_no_more_memory_than_batch_norm(memory_format, shift):
    check_bounds(*measure_both(memory_format, shift))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_need_no_more_memory_than_in_batch_norm(memory_format, dtype):
    check_bounds(*measure_both(memory_format, 0.0, dtype=dtype))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "far", [slice(None), slice(0, 24), slice(0, 16), slice(7, 8)], ids=["all", "many", "some", "one"]
)
def test_channels_far_from_zero_need_no_more_memory_than_in_batch_norm(memory_format, far):
    check_bounds(*measure_both(memory_format, 100.0, far=far))


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_ranks_need_no_more_memory_than_batch_norm(memory_format, world_size):
    for plain, synchronised in run_on_ranks(measure_both, world_size, memory_format, 0.0):
        check_bounds(plain, synchronised)
