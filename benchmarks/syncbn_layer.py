"""Times of the synchronised layer on CPUs beside torch.nn.BatchNorm2d and other synchronised layers.

For each shape and memory format every rank does in turn, again and again, so that what disturbs the machine
disturbs all alike, forward and backward of:

    local        torch.nn.BatchNorm2d, not synchronised
    interleaved  the same, with one bare all_reduce before forward and one before backward: the yardstick,
                 since every wait for other ranks leaves cold caches
    sync         SyncBatchNorm
    alone        SyncBatchNorm with its collectives left out
    detectron2   the formula of detectron2's NaiveSyncBatchNorm
    fairscale    the formula of fairscale's SyncBatchNorm
    compiled     torch.nn.BatchNorm2d under torch.compile (option --compiled), not synchronised

Printed are medians and quartiles in milliseconds, and ratios of the medians with their goals:

    sync / interleaved   at most 0.80 for contiguous tensors, 1.05 for channels_last
    alone / local        at most 0.75 and 1.00
    own time of a small layer, sync - (interleaved - local), at most 0.2 ms
    dispatched operators of forward and backward, fewer than 60

Ranks have the allocation settings of a job's workers, unless --glibc-defaults is given.
torch.nn.SyncBatchNorm has no CPU kernels and is not among them; `syncbn_launches.py` compares launches.

    python benchmarks/syncbn_layer.py             # about two minutes
    python benchmarks/syncbn_layer.py --check     # exit status 1 if a goal is missed
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the counter of operators is part of the tests

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from syncbn import SyncBatchNorm, passes
from syncbn.collectives import reduce
from tests.syncbn.launch_counter import count_operators
from trainer.worker_settings import CPU_VARIABLES

Shape = tuple[int, ...]
Step = Callable[[], None]

CONVOLUTIONS = [(8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 14, 14), (8, 2048, 7, 7)]
PERCEPTRON = (30, 100)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {"contiguous": (0.80, 0.75), "channels_last": (1.05, 1.00)}
OWN_MILLISECONDS = 0.2
OPERATORS = 60


@dataclass(frozen=True)
class Case:
    """A tensor to normalise."""

    shape: Shape
    memory_format: str

    def __str__(self) -> str:
        return f"{self.shape!s:16} {self.memory_format:13}"


CASES = [
    *(Case(shape, memory_format) for shape in CONVOLUTIONS for memory_format in FORMATS),
    Case(PERCEPTRON, "contiguous"),
]


class SumOverRanks(torch.autograd.Function):
    """Sum of a vector over the ranks, with the sum of the gradients as gradient."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor) -> Tensor:
        total = vector.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class Detectron2(nn.BatchNorm2d):
    """Formula of detectron2's NaiveSyncBatchNorm: E[x²] - E[x]² of equal shares, by operators of torch."""

    def forward(self, x: Tensor) -> Tensor:
        dimensions = [0, *range(2, x.dim())]
        vector = torch.cat([x.mean(dimensions), (x * x).mean(dimensions)])
        mean, square = (SumOverRanks.apply(vector) / dist.get_world_size()).chunk(2)
        variance = square - mean * mean
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach(), self.momentum)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)


class FairscaleFunction(torch.autograd.Function):
    """Formula of fairscale's SyncBatchNorm, whose gradient is written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        dimensions = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        vector = torch.cat([x.mean(dimensions), (x * x).mean(dimensions), x.new_full((1,), 1.0)]) * count
        dist.all_reduce(vector)
        total = vector[-1]
        mean, square = (vector[:-1] / total).chunk(2)
        variance = square - mean * mean
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * total / (total - 1), layer.momentum)
        inverse = (variance + layer.eps).rsqrt()
        shape = (1, -1, *(1,) * (x.dim() - 2))
        ctx.save_for_backward(x, weight, mean, inverse, total)
        scale = weight * inverse
        return x * scale.view(shape) + (bias - mean * scale).view(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, total = ctx.saved_tensors
        dimensions = [0, *range(2, x.dim())]
        shape = (1, -1, *(1,) * (x.dim() - 2))
        normalised = (x - mean.view(shape)) * inverse.view(shape)
        bias_gradient, weight_gradient = dy.sum(dimensions), (dy * normalised).sum(dimensions)
        sums = torch.cat([bias_gradient, weight_gradient])
        dist.all_reduce(sums)
        mean_dy, mean_product = (sums / total).chunk(2)
        dx = dy - mean_dy.view(shape) - normalised * mean_product.view(shape)
        return dx * (weight * inverse).view(shape), weight_gradient, bias_gradient, None


class Fairscale(nn.BatchNorm2d):
    """See `FairscaleFunction`."""

    def forward(self, x: Tensor) -> Tensor:
        return FairscaleFunction.apply(x, self.weight, self.bias, self)


def make_steps(case: Case, with_compiled: bool) -> dict[str, Step]:
    shape, memory_format = case.shape, FORMATS[case.memory_format]
    x, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
    channels = shape[1]
    vector = torch.zeros(2 * channels + 2, dtype=torch.float64)

    def train(layer: nn.Module, exchange: Callable[[Tensor], object] = lambda vector: None) -> Step:
        def step() -> None:
            exchange(vector)
            y = layer(x.detach().requires_grad_())
            exchange(vector)
            y.backward(dy)

        return step

    plain = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    steps = {
        "local": train(plain(channels)),
        "interleaved": train(plain(channels), dist.all_reduce),
        "sync": train(SyncBatchNorm(channels)),
        "alone": train(SyncBatchNorm(channels)),
        "detectron2": train(Detectron2(channels)),
        "fairscale": train(Fairscale(channels)),
    }
    if with_compiled:
        steps["compiled"] = train(torch.compile(plain(channels), dynamic=False))
    return steps


def leave_out(vector: Tensor, call: object) -> None:
    """Exchange nothing."""


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 5):
        for name, step in steps.items():
            passes.all_reduce = leave_out if name == "alone" else reduce.all_reduce
            dist.barrier()
            started = time.perf_counter()
            step()
            if repeat >= 5:
                times[name].append(1e3 * (time.perf_counter() - started))
    passes.all_reduce = reduce.all_reduce
    return times


def work(rank: int, store: Path, results: Any, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in CASES:
        steps = make_steps(case, options.compiled)
        times = measure(steps, options.repeats)
        operators = count_operators(case.shape, FORMATS[case.memory_format])
        if rank == 0:
            results.put((case, times, operators))
    dist.destroy_process_group()


def describe(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.2f} [{low:5.2f}, {high:5.2f}]"


def report(case: Case, times: dict[str, list[float]], operators: int) -> list[str]:
    """Print one line, and return the goals that were missed."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = middle["sync"] / middle["interleaved"], middle["alone"] / middle["local"]
    own = middle["sync"] - (middle["interleaved"] - middle["local"])
    columns = "  ".join(describe(values) for values in times.values())
    print(f"{case} {columns}   {ratios[0]:5.2f} {ratios[1]:5.2f} {own:6.3f} {operators:4}", flush=True)
    missed = [f"{operators} operators"] if operators >= OPERATORS else []
    if case.shape == PERCEPTRON:
        return missed + ([f"own time {own:.3f} ms"] if own > OWN_MILLISECONDS else [])
    names = ("sync / interleaved", "alone / local")
    goals = GOALS[case.memory_format]
    return missed + [
        f"{name} {ratio:.2f} (goal {goal:.2f})"
        for name, ratio, goal in zip(names, ratios, goals, strict=True)
        if ratio > goal
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--compiled", action="store_true", help="with the compiled local layer (needs g++)")
    parser.add_argument(
        "--glibc-defaults", action="store_true", help="without the allocation settings of workers"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if a goal is missed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, value in CPU_VARIABLES.items():
        if options.glibc_defaults:
            os.environ.pop(name, None)
        else:
            os.environ.setdefault(name, value)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, 2 ranks with one thread each, "
        f"gloo over loopback, {'defaults of glibc' if options.glibc_defaults else 'settings of workers'}, "
        f"{options.repeats} repeats interleaved; milliseconds, median [quartiles]"
    )
    names = ["local", "interleaved", "sync", "alone", "detectron2", "fairscale"]
    columns = "  ".join(f"{name:21}" for name in names + ["compiled"] * options.compiled)
    print(f"{'shape':16} {'format':13} {columns}   sync/interleaved, alone/local, own ms, operators")
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        processes = mp.spawn(work, (Path(folder, "store"), results, options), nprocs=2, join=False)
        for _ in CASES:
            case, times, operators = results.get()
            missed += [
                f"{case.shape} {case.memory_format}: {goal}" for goal in report(case, times, operators)
            ]
        while not processes.join():
            pass
    print("goals: " + ("missed by " + "; ".join(missed) if missed else "met"))
    sys.exit(bool(missed and options.check))


if __name__ == "__main__":
    main()
