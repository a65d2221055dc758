"""Counts dispatched operators and GPU launches of the layer and of torch.nn.SyncBatchNorm, without a GPU.

Two ranks run the CUDA path over stand-ins for torch's kernels, with Triton's kernels in its interpreter, as
the tests do. A launch is an operator that is neither a view nor an allocation, a kernel, or a collective.
What a host waits for are operators that read a value of the device. Times are not measured: the stand-ins
have none of a GPU.

    triton    SyncBatchNorm with Triton's kernels
    torch ops SyncBatchNorm without Triton
    torch     torch.nn.SyncBatchNorm, by its autograd function

    python benchmarks/syncbn_launches.py             # about half a minute
    python benchmarks/syncbn_launches.py --check     # exit status 1 if a direction has more than 5 launches
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the stand-ins are part of the tests

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction

from syncbn import SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.emulated_cuda import emulated_cuda
from tests.syncbn.launch_counter import LaunchCounter

GOAL = 5
SHAPE = (4, 8, 6, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LAYERS = ("triton", "torch ops", "torch")

Counts = tuple[int, int, int]


def make_call(layer: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    own = SyncBatchNorm(SHAPE[1], dtype=parameter_dtype)
    own.layer_name = "norm"
    if layer != "torch":
        return own

    def call(x: Tensor) -> Tensor:
        assert own.num_batches_tracked is not None
        own.num_batches_tracked.add_(1)
        buffers = own.running_mean, own.running_var
        group, size = dist.group.WORLD, dist.get_world_size()
        return TorchFunction.apply(x, own.weight, own.bias, *buffers, own.eps, 0.1, group, size)

    return call


def count(layer: str, dtype: torch.dtype) -> list[Counts]:
    """Return dispatched operators, launches and host waits, forward and backward, of the second step."""
    call = make_call(layer, dtype)
    x, dy = torch.randn(SHAPE).to(dtype).requires_grad_(), torch.randn(SHAPE).to(dtype)
    with emulated_cuda("triton" if layer == "triton" else "vectors", queued=True):
        call(x).backward(dy)
        with LaunchCounter() as forward:
            y = call(x)
        x.grad = None
        with LaunchCounter() as backward:
            torch.autograd.grad(y, x, dy)
    return [(each.dispatched, len(each.launches), len(each.host_waits)) for each in (forward, backward)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 if the goal is missed")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, 2 ranks, emulated kernels")
    print(f"{'layer':10} {'dtype':9} {'direction':9} {'dispatched':>10} {'launches':>8} {'host waits':>10}")
    missed = False
    for layer in LAYERS:
        for dtype in DTYPES:
            for direction, counts in zip(
                ("forward", "backward"), run_on_ranks(count, 2, layer, dtype)[0], strict=True
            ):
                name = str(dtype).removeprefix("torch.")
                print(f"{layer:10} {name:9} {direction:9} {counts[0]:10} {counts[1]:8} {counts[2]:10}")
                missed |= layer == "triton" and counts[1] > GOAL
    print(f"goal, at most {GOAL} launches by Triton: {'missed' if missed else 'met'}")
    sys.exit(missed and options.check)


if __name__ == "__main__":
    main()
