"""The GPU path: one GPU suffices, which two gloo ranks then share; with several, NCCL is tested too. Never
run so far.
"""

import pytest
import torch
import torch.distributed as dist

from syncbn import SyncBatchNorm, sync_batch_norm
from tests.dist import run_on_ranks
from tests.syncbn.reference import expect, make_case, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ["gloo"] + (["nccl"] if torch.cuda.device_count() > 1 else [])


def normalise(case, backend, memory_format):
    rank = dist.get_rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    group = dist.new_group(backend=backend)
    x = case.shards[rank].cuda().contiguous(memory_format=memory_format).requires_grad_()
    weight = case.weight.cuda().requires_grad_()
    y, moments = sync_batch_norm(x, weight, case.bias.cuda(), process_group=group)
    y.backward(case.gradients[rank].cuda())
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)
    return [tensor.detach().cpu() for tensor in (y, x.grad, weight.grad, moments.pack())]


@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("counts", [[4, 4], [5, 2], [3, 0]])
@pytest.mark.parametrize(
    ("dtype", "shift", "bound"),
    [
        (torch.float64, 0.0, 1e-12),
        (torch.float32, 0.0, 2e-6),
        (torch.float32, 100.0, 2e-6),
        (torch.bfloat16, 0.0, 8e-3),
    ],
)
def test_every_rank_gets_what_one_device_computes(dtype, shift, bound, counts, memory_format, backend):
    case = make_case(counts, rest=(9, 11), dtype=dtype, shift=shift)
    expected = expect(case)
    results = run_on_ranks(normalise, 2, case, backend, memory_format, timeout_seconds=120)
    for rank, (y, dx, _, moments) in enumerate(results):
        assert relative_error(y, expected.outputs[rank]) <= bound
        assert relative_error(dx, expected.gradients[rank]) <= 5 * bound
        assert torch.equal(moments, results[0][3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gpu_computes_what_the_cpu_does(dtype):
    case = make_case([6], dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        x = case.shards[0].to(device).requires_grad_()
        weight = case.weight.to(device).requires_grad_()
        y, moments = sync_batch_norm(x, weight, case.bias.to(device))
        y.backward(case.gradients[0].to(device))
        results.append([tensor.detach().cpu() for tensor in (y, x.grad, weight.grad, moments.pack())])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-5, atol=1e-5)


def test_training_does_not_make_the_host_wait():
    layer = SyncBatchNorm(8).cuda()
    x = torch.randn(4, 8, 16, 16, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
