"""Cost of each probe compared with a training step, on two gloo workers of this machine.

Prints median over rounds and range in milliseconds for each measurement, the equivalent number of training
steps, and the share of the run time at the default of 100 steps between measurements. Probes and steps
alternate in one run.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from trainer.data import Batch
from trainer.distributed import RankInfo
from trainer.jobspec import CnnSpec, JobSpec, MlpSpec, ModelSpec, ProbesSpec
from trainer.models import build_model
from trainer.probes import Probes
from trainer.training.optim import build_optimizer

WORKERS, BATCH, STEPS = 2, 60, 20
"""Number of steps that are timed together in each round."""
NETWORKS: dict[str, tuple[ModelSpec, tuple[int, ...]]] = {
    "3 x 100 sigmoids on 784 values": (MlpSpec(), (784,)),
    "convolutions of 16, 32 and 64 channels on 28 x 28 images": (CnnSpec(channels=[16, 32, 64]), (1, 28, 28)),
}
MEASUREMENTS = (
    "percentiles",
    "drift",
    "discrepancy",
    "variance_share",
    "gradient_norm",
    "landscape",
    "shift",
)


def work(rank: int, store: str, rounds: int) -> None:
    """Time the steps and measurements of one worker; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    worker = RankInfo(rank, WORKERS, torch.device("cpu"))
    for title, (model, shape) in NETWORKS.items():
        seconds = measure(model, shape, worker, rounds)
        if rank == 0:
            report(title, seconds)
    dist.destroy_process_group()


def measure(
    model_spec: ModelSpec, shape: tuple[int, ...], worker: RankInfo, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds per round of a training step, of each measurement, and of all together."""
    spec = JobSpec(model=model_spec, num_workers=WORKERS, global_batch_size=BATCH, steps=1)
    model = build_model(spec.model, spec.norm, shape, 10, spec.seed)
    parallel = DistributedDataParallel(model, forward_sync_buffers=False)
    optimizer = build_optimizer(spec.optimizer, model)
    batch = Batch(torch.rand(BATCH // WORKERS, *shape), torch.randint(10, (BATCH // WORKERS,)))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(parallel(batch.inputs), batch.labels).backward()
        optimizer.step()

    def probe(*names: str) -> Callable[[], object]:
        probes = Probes(spec.model_copy(update={"probes": ProbesSpec(measure=list(names))}), model, worker)
        return lambda: probes.measure([batch], 0.1)

    calls = {"all": probe(*MEASUREMENTS), **{name: probe(name) for name in MEASUREMENTS}}
    seconds: dict[str, list[float]] = {"step": [], **{name: [] for name in calls}}
    for number in range(rounds + 1):
        for name, (call, repeats) in {
            "step": (step, STEPS),
            **{name: (call, 1) for name, call in calls.items()},
        }.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            if number > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Print one line per measurement."""
    middles = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{title}, {BATCH} samples, {WORKERS} workers, norm sync; n = {len(seconds['step'])}")
    for name, values in seconds.items():
        in_steps = middles[name] / middles["step"]
        line = (
            f"  {name:15} {middles[name] * 1e3:7.2f} ms ({min(values) * 1e3:.2f} to {max(values) * 1e3:.2f})"
        )
        print(
            line
            if name == "step"
            else f"{line} = {in_steps:5.1f} steps, {in_steps / (100 + in_steps):6.1%} of the time"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (str(Path(folder) / "store"), arguments.rounds), WORKERS)
