"""The cases that torch tests its own SyncBatchNorm by on GPUs, on the CPU; those not here stand beside what
they test.
"""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from syncbn import ConversionError, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from tests.dist import run_on_ranks

pytestmark = pytest.mark.dist
BUFFERS_OPTION = "forward_sync_buffers"
if BUFFERS_OPTION not in inspect.signature(DistributedDataParallel).parameters:
    BUFFERS_OPTION = "broadcast_buffers"


class BatchNormNet(nn.Module):
    def __init__(self, affine=True):
        super().__init__()
        self.fc1 = nn.Linear(2, 40, bias=False)
        self.bn = nn.BatchNorm1d(4, affine=affine)
        self.fc2 = nn.Linear(40, 4, bias=False)

    def forward(self, x):
        x = self.fc1(x).reshape(-1, 4, 10)
        return torch.softmax(self.fc2(self.bn(x).reshape(-1, 40)), dim=1)


class FlatBatchNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.bn(self.fc1(x)))


def make_network(kind):
    torch.manual_seed(0)
    return {"net": BatchNormNet, "no_affine": lambda: BatchNormNet(affine=False), "flat": FlatBatchNormNet}[
        kind
    ]().double()


def train(network, x, target):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), target).backward()
        optimizer.step()
    return network.state_dict()


def train_in_parallel(kind, x, target):
    network = DistributedDataParallel(convert_sync_batchnorm(make_network(kind)), **{BUFFERS_OPTION: False})
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train(network, x.chunk(world_size)[rank], target.chunk(world_size)[rank])
    return network.module.state_dict()


@pytest.mark.parametrize("kind", ["net", "no_affine", "flat"])
@pytest.mark.parametrize("each", [1, 3])
def test_five_iterations_equal_those_of_one_device(kind, each):
    x, target = torch.randn(2 * each, 2, dtype=torch.float64), torch.randn(2 * each, 4, dtype=torch.float64)
    expected = train(make_network(kind), x, target)
    for state in run_on_ranks(train_in_parallel, 2, kind, x, target):
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)


def normalise_share(x, dtype, memory_format, requires_grad):
    rank = dist.get_rank()
    layer = SyncBatchNorm(x.shape[1], momentum=1.0).to(dtype)
    own = x.tensor_split([3, 3])[rank].to(dtype)
    own = own.contiguous(memory_format=memory_format).requires_grad_(requires_grad)
    y = layer(own)
    y.sum().backward()
    assert not y.isnan().any()
    assert (own.grad is not None) == requires_grad
    assert own.grad is None or not own.grad.isnan().any()
    assert y.is_contiguous(memory_format=memory_format)
    return y.detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rest", "memory_format"),
    [((), torch.contiguous_format), ((4, 4), torch.channels_last), ((2, 3, 4), torch.channels_last_3d)],
)
def test_input_sizes_that_differ_and_one_that_is_nothing(rest, dtype, memory_format, requires_grad):
    x = torch.randn(8, 5, *rest).to(dtype)
    results = run_on_ranks(normalise_share, 3, x, dtype, memory_format, requires_grad)
    dimensions = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x.double(), dimensions)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    for _, running_mean, running_var in results:
        torch.testing.assert_close(running_mean, mean.to(dtype), **tolerance)
        torch.testing.assert_close(running_var, variance.to(dtype), **tolerance)
    y = nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), y.to(dtype), **tolerance)


def make_sharded(mixed):
    torch.manual_seed(0)
    network = convert_sync_batchnorm(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
        )
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, **({"mp_policy": policy} if policy else {})}
    for layer in (network[0], network[1], network[4]):
        fully_shard(layer, **options)
    return fully_shard(network, **options)


def train_sharded(x, target, mixed):
    network = make_sharded(mixed)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = network(x.chunk(world_size)[rank])
        nn.functional.mse_loss(y.float(), target.chunk(world_size)[rank]).backward()
        optimizer.step()
    state = network.state_dict()
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value)
        for name, value in state.items()
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_fully_sharded_training_equals_that_of_one_device(mixed):
    x, target = torch.randn(6, 2, 5, 5), torch.randn(6, 2)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(x), target).backward()
        optimizer.step()
    tolerance = 2e-2 if mixed else 1e-5
    for state in run_on_ranks(train_sharded, 2, x, target, mixed):
        torch.testing.assert_close(state, network.state_dict(), rtol=tolerance, atol=tolerance)


def convert_and_revert_sharded():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain, converted = nn.BatchNorm2d(4), SyncBatchNorm(4)
    for layer in (plain, converted):
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ConversionError, match=r"cannot convert .*FSDPBatchNorm2d.* before fully_shard"):
        convert_sync_batchnorm(plain)
    with pytest.raises(ConversionError, match=r"cannot revert .*FSDPSyncBatchNorm.* before fully_shard"):
        revert_sync_batchnorm(converted)


def test_fully_sharded_layers_are_neither_converted_nor_reverted():
    run_on_ranks(convert_and_revert_sharded, 2)


def normalise_under_autocast():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(torch.randn(5, 3))
    y.float().square().sum().backward()
    return y.dtype, network[0].weight.grad.dtype, network[1].running_mean.dtype


def test_autocast_gives_the_layer_its_dtype():
    assert run_on_ranks(normalise_under_autocast, 2) == [(torch.bfloat16, torch.float32, torch.float32)] * 2
