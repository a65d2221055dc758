"""Time of a training step of the network of Figure 1 under each norm, on two gloo workers of this machine.

Prints median over blocks and range in milliseconds per step, and the ratio to no norm. Norms alternate in
one run.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.jobspec import MlpSpec, Norm, SgdSpec
from trainer.models import build_model
from trainer.training.optim import build_optimizer

WORKERS, BATCH = 2, 60
NORMS = (Norm.NONE, Norm.BATCH, Norm.SYNC, Norm.GROUP, Norm.LAYER)


def work(rank: int, store: str, blocks: int, steps: int) -> None:
    """Time blocks of steps on one worker; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    models = {
        norm: DistributedDataParallel(
            build_model(MlpSpec(), norm, (784,), 10, seed=0), forward_sync_buffers=False
        )
        for norm in NORMS
    }
    optimizers = {norm: build_optimizer(SgdSpec(lr=0.1), model) for norm, model in models.items()}
    inputs, labels = torch.rand(BATCH // WORKERS, 784), torch.randint(10, (BATCH // WORKERS,))
    seconds: dict[Norm, list[float]] = {norm: [] for norm in NORMS}
    for block in range(blocks + 1):
        for norm in NORMS:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                step(models[norm], optimizers[norm], inputs, labels)
            if block > 0:  # the first block warms up
                seconds[norm].append((time.perf_counter() - began) / steps)
    if rank == 0:
        report(seconds)
    dist.destroy_process_group()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    """Make one optimizer step."""
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def report(seconds: dict[Norm, list[float]]) -> None:
    """Print one line per norm."""
    yardstick = statistics.median(seconds[Norm.NONE])
    for norm, values in seconds.items():
        middle = statistics.median(values)
        span = f"{min(values) * 1e3:.2f} to {max(values) * 1e3:.2f}"
        print(f"{norm.value:6} {middle * 1e3:6.2f} ms a step ({span}), {middle / yardstick:.2f} x none")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100, help="in a block")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        multiprocessing.spawn(work, (store, arguments.blocks, arguments.steps), WORKERS)
