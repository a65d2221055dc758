"""Cost of synchronised statistics for a model: a training step of ResNet-18 under DDP on two gloo workers.

Each worker has one thread. From one run it prints, as medians over blocks with ranges: milliseconds per
step with local statistics (`batch`) and synchronised ones (`sync`) in alternating blocks, in wall time and
in processor time, which excludes waiting and other processes; the ratio of adjacent blocks; the time of
the layers' collectives alone, as bare all_reduces of the same sizes; collectives and bytes of a step,
counted where torch passes them to the backend; and the memory that autograd keeps for the backward pass,
and the peak of both passes.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["KINETO_LOG_LEVEL"] = "99"  # of the profiler, which reports at every start that it sees no GPU
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn import SyncBatchNorm, convert_sync_batchnorm

WORKERS = 2
NORMS = ("batch", "sync")


@dataclass
class Training:
    """Model with its optimizer and one batch, which every step uses."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor

    def differentiate(self, between: Callable[[], None] = lambda: None) -> None:
        """Run the forward and the backward pass; `between` is called between them."""
        loss = F.cross_entropy(self.model(self.images), self.labels)
        between()
        loss.backward()

    def step(self) -> None:
        """Make one optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.differentiate()
        self.optimizer.step()


@dataclass
class Collectives(TorchDispatchMode):
    """Recorder of the bytes of each collective by phase, issued by Python, the compiler or DDP's reducer
    in C++.

    The layers call gloo directly, without torch's dispatcher.
    """

    phase: str = "forward"
    bytes: dict[str, list[int]] = field(default_factory=lambda: {"forward": [], "backward": []})

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and record it if it is a collective of torch.distributed."""
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.note(tensors)
        return func(*args, **(kwargs or {}))

    def note(self, tensors: list[Any]) -> None:
        """Record the bytes that one rank sends in a collective."""
        self.bytes[self.phase].append(sum(tensor.nbytes for tensor in tensors))


@dataclass
class Costs:
    """Costs of a step other than time."""

    collectives: dict[str, list[int]]
    kept_bytes: int
    peak_bytes: int


def build(norm: str, count: int, size: int) -> Training:
    """Build the same network and the same `count` images of `size` x `size` for both norms."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    if norm == "sync":
        convert_sync_batchnorm(model)
    torch.manual_seed(1 + dist.get_rank())
    images, labels = torch.randn(count, 3, size, size), torch.randint(10, (count,))
    parallel = DistributedDataParallel(model, forward_sync_buffers=False)
    return Training(parallel, torch.optim.SGD(model.parameters(), lr=0.01), images, labels)


def count_collectives(training: Training) -> dict[str, list[int]]:
    """Return the bytes of each collective of one step, by phase."""

    def enter_backward() -> None:
        collectives.phase = "backward"

    reduce = dist.ProcessGroupGloo.allreduce

    def reduce_and_note(lane: Any, tensors: list[Any], options: Any) -> Any:
        collectives.note(tensors)
        return reduce(lane, tensors, options)

    with mock.patch.object(dist.ProcessGroupGloo, "allreduce", reduce_and_note), Collectives() as collectives:
        training.differentiate(enter_backward)
    return collectives.bytes


def kept_bytes(training: Training) -> int:
    """Count the memory that autograd keeps between the passes, each storage once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in training.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        training.differentiate()
    return sum(kept.values())


def peak_bytes(training: Training) -> int:
    """Return the peak memory of both passes beyond what was allocated before, by torch's allocator.

    The gradients of parameters were allocated before, and are accumulated.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        training.differentiate()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def all_reduce_each(vectors: list[Tensor]) -> None:
    """Issue only the collectives of the layers, in the order of the layers."""
    for vector in vectors:
        dist.all_reduce(vector)


def work(rank: int, store: str, blocks: int, steps: int, images: int, size: int) -> None:
    """Measure on one worker; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    trainings = {norm: build(norm, images, size) for norm in NORMS}
    for training in trainings.values():
        for _ in range(3):  # DDP rearranges its buckets after the first step
            training.step()
    costs = {
        norm: Costs(count_collectives(training), kept_bytes(training), peak_bytes(training))
        for norm, training in trainings.items()
    }
    vectors = [torch.zeros(size // 8, dtype=torch.float64) for size in layer_collectives(costs)]
    actions: dict[str, Callable[[], None]] = {norm: training.step for norm, training in trainings.items()}
    actions["bare"] = lambda: all_reduce_each(vectors)
    clocks = {"by the clock": time.perf_counter, "of processor time": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in actions} for clock in clocks}
    for _ in range(blocks):
        for name, action in actions.items():
            dist.barrier()
            began = [clock() for clock in clocks.values()]
            for _ in range(steps):
                action()
            for start, (name_of_clock, clock) in zip(began, clocks.items(), strict=True):
                seconds[name_of_clock][name].append((clock() - start) / steps)
    if rank == 0:
        layers = [module for module in trainings["sync"].model.modules() if isinstance(module, SyncBatchNorm)]
        print(
            f"ResNet-18, {images} images of {size} x {size} on each of {WORKERS} workers, {blocks} blocks "
            f"of {steps} steps"
        )
        for clock, values in seconds.items():
            report_times(clock, values)
        report_costs(costs, layers)
        report_torch()
    dist.barrier()
    dist.destroy_process_group()


def layer_collectives(costs: dict[str, Costs]) -> list[int]:
    """Return the bytes of the collectives that only `sync` has."""
    extra = [size for phase in ("forward", "backward") for size in costs["sync"].collectives[phase]]
    for sizes in costs["batch"].collectives.values():
        for size in sizes:
            extra.remove(size)  # DDP's gradients, which `sync` has too
    return extra


def spread(values: list[float], scale: float, digits: int) -> str:
    """Format a median with its range."""
    middle, low, high = (
        f"{value * scale:.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def report_times(clock: str, seconds: dict[str, list[float]]) -> None:
    for norm in NORMS:
        print(f"{norm:5}  {spread(seconds[norm], 1e3, 1)} ms a step {clock}")
    ratios = [sync / batch for sync, batch in zip(seconds["sync"], seconds["batch"], strict=True)]
    print(f"       sync / batch, block by block: {spread(ratios, 1, 2)}")
    print(f"       the layers' collectives alone: {spread(seconds['bare'], 1e3, 1)} ms a step")


def report_costs(costs: dict[str, Costs], layers: list[nn.Module]) -> None:
    for norm, cost in costs.items():
        counts = ", ".join(f"{phase} {len(sizes)}" for phase, sizes in cost.collectives.items())
        total = sum(map(sum, cost.collectives.values()))
        print(f"{norm:5}  collectives a step: {counts}; {total:,} bytes")
    extra = layer_collectives(costs)
    print(f"of the layers: {len(extra)} collectives for {len(layers)} layers, {sum(extra):,} bytes a step")
    assert len(extra) == 2 * len(layers), "a layer does not issue one collective forward and one backward"
    for name in ("kept", "peak"):
        batch, sync = (getattr(costs[norm], f"{name}_bytes") / 2**20 for norm in NORMS)
        print(f"memory, {name}: batch {batch:.1f} MiB, sync {sync:.1f} MiB, ratio {sync / batch:.3f}")


def report_torch() -> None:
    """Print why torch's own synchronised layer is not in the table."""
    try:
        nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4))
    except ValueError as error:
        print(f"torch.nn.SyncBatchNorm is not measured: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--images", type=int, default=8, help="on each worker")
    parser.add_argument("--size", type=int, default=64, help="of an image, in pixels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        options = (arguments.blocks, arguments.steps, arguments.images, arguments.size)
        multiprocessing.spawn(work, (store, *options), WORKERS)
