"""What this trainer costs over a plain training loop: samples per second of both, on the same model, data and workers, in one run.

Both run in the processes that torchrun starts. The plain loop is what people write for it: DistributedDataParallel, the same
batches, cross-entropy, SGD, and nothing else. The trainer's workers also agree in every step on the loss and on what to do next,
and rank 0 keeps its journal. Blocks of steps alternate, each loop first in every other pair. Prints for each norm the median and
range of both over blocks, the ratio of neighbouring blocks (goal: at least 0.98), that of the quickest quarters of all steps,
which other work on the machine disturbs least, and what the parts of a step that the plain loop does not have take.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import run as torchrun
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from trainer.checkpoint import Checkpoints
from trainer.control import Control
from trainer.data import Batch, Dataset, open_dataset
from trainer.journal import Journal, RankZeroJournal, Silent
from trainer.loop import train
from trainer.models import build_model
from trainer.outbox import Outbox
from trainer.progress import ProgressFile
from trainer.spec import JobSpec
from trainer.work import identity
from trainer.worker import Worker

WORKERS = 2
SPEC = {
    "model": {"name": "torchvision:resnet18"},
    "data": {"name": "synthetic", "shape": [3, 64, 64], "classes": 10, "train_samples": 512, "test_samples": 16},
    "num_workers": WORKERS,
    "global_batch_size": 16,
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "eval_every": 1_000_000,
}


class Timed:
    """A dataset that notes when a batch is asked for: each time is the end of a step, and the beginning of another."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset, self.times, self.processor_times = dataset, list[float](), list[float]()
        self.shape, self.classes = dataset.shape, dataset.classes
        self.skipped_images, self.digest = dataset.skipped_images, dataset.digest
        self.test, self.close = dataset.test, dataset.close

    def train(self, first_step: int) -> Iterator[list[Batch]]:
        """Pass on batches."""
        for batch in self._dataset.train(first_step):
            self.times.append(time.perf_counter())
            self.processor_times.append(time.process_time())
            yield batch


def plain(spec: JobSpec, worker: Worker, dataset: Timed) -> None:
    """Train as people write it."""
    model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed)
    parallel = DistributedDataParallel(model, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step, [batch] in enumerate(dataset.train(0)):
        if step == spec.steps:
            return
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(parallel(batch.inputs), batch.labels).backward()
        optimizer.step()


@contextmanager
def accounts(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds spent in what the plain loop does not have."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return run

    with (
        mock.patch.object(Control, "begin", timed("reading the loss and sending it", Control.begin)),
        mock.patch.object(Control, "finish", timed("waiting for the others' losses", Control.finish)),
        mock.patch.object(RankZeroJournal, "update", timed("progress file", RankZeroJournal.update)),
        mock.patch.object(LambdaLR, "step", timed("schedule", LambdaLR.step)),
    ):
        yield


def ours(spec: JobSpec, worker: Worker, dataset: Timed, folder: Path) -> None:
    """Train by this project's loop, with all that it does beside training."""
    outbox = Outbox(folder)
    journal: Journal = (
        RankZeroJournal(spec.steps, outbox, ProgressFile(folder, spec.steps, spec.global_batch_size))
        if worker.rank == 0
        else Silent()
    )
    checkpoints = Checkpoints(str(folder / "checkpoints"), spec.checkpoint, identity(spec, dataset.digest), worker)
    train(spec, worker, journal, dataset, checkpoints)
    outbox.close()


def work(blocks: int, steps: int, norm: str) -> None:
    """Time blocks of both loops on one worker; rank 0 prints."""
    rank = dist.get_rank()
    worker = Worker(rank, WORKERS, torch.device("cpu"))
    spec = JobSpec.model_validate(SPEC | {"steps": steps, "norm": norm})
    seconds: dict[str, list[list[float]]] = {"plain": [], "trainer": []}
    processor = dict.fromkeys(seconds, 0.0)
    spent: dict[str, float] = {}
    for block in range(blocks + 1):
        turns = list(seconds.items())
        for name, times in turns if block % 2 else reversed(turns):
            dataset = Timed(open_dataset(spec, rank, WORKERS, worker.device, torch.float32))
            with tempfile.TemporaryDirectory() as folder:
                dist.barrier()
                if name == "plain":
                    plain(spec, worker, dataset)
                else:
                    with accounts(spent), redirect_stdout(io.StringIO()):
                        ours(spec, worker, dataset, Path(folder))
            used = dataset.processor_times
            processor[name] += (used[-1] - used[1]) / (len(used) - 2)
            dataset.close()
            between = [after - before for before, after in zip(dataset.times, dataset.times[1:], strict=False)]
            if block > 0:  # the first one warms up
                times.append(between[1:])
    if rank == 0:
        report(norm, seconds)
        print(f"{norm:5} trainer / plain by rank 0's processor time: {processor['plain'] / processor['trainer']:.3f}")
        for name, value in spent.items():
            print(f"{norm:5} {name}: {value / (blocks + 1) / steps * 1e3:.2f} ms a step")


def report(norm: str, seconds: dict[str, list[list[float]]]) -> None:
    """Print both loops' speed and their ratio, from the seconds of each step of each block."""
    medians = {name: [statistics.median(block) for block in blocks] for name, blocks in seconds.items()}
    for name, times in medians.items():
        speeds = sorted(SPEC["global_batch_size"] / value for value in times)
        print(
            f"{norm:5} {name:8} {statistics.median(speeds):7.1f} samples/s ({speeds[0]:.1f} to {speeds[-1]:.1f}),"
            f" {statistics.median(times) * 1e3:.1f} ms a step"
        )
    ratios = sorted(p / o for p, o in zip(medians["plain"], medians["trainer"], strict=True))
    quarters = {name: statistics.quantiles(chain.from_iterable(blocks))[0] for name, blocks in seconds.items()}
    print(
        f"{norm:5} trainer / plain: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), goal 0.98;"
        f" by the quickest quarters {quarters['plain'] / quarters['trainer']:.3f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    arguments = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # one of torchrun's processes
        dist.init_process_group("gloo")
        for norm in ("none", "sync"):
            work(arguments.blocks, arguments.steps, norm)
        dist.destroy_process_group()
    else:
        torchrun.main(["--standalone", f"--nproc-per-node={WORKERS}", __file__, *sys.argv[1:]])
