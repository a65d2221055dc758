"""Throughput of this trainer compared with a plain training loop, on the same model, data and workers.

Both run in processes started by torchrun. The plain loop is a typical one: DistributedDataParallel, the
same batches, cross-entropy, SGD, and nothing else. The trainer's workers additionally agree in every step
on the loss and the next action, and rank 0 logs metrics. The two alternate step by step, so that other
load affects both equally. They are launched several times, in alternating order, since the memory
placement of a launch makes either of them several per cent faster for as long as it runs. Prints for each
norm both medians, the ratio of adjacent steps (goal: at least 0.98) as median and range over launches, and
the time of the parts of a step that the plain loop does not have.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from trainer.checkpoint.checkpoints import Checkpoints
from trainer.data import Batch, Dataset, open_dataset
from trainer.distributed import RankInfo
from trainer.jobspec import JobSpec
from trainer.models import build_model
from trainer.tracking.logger import MetricsLogger, NullLogger, RankZeroLogger
from trainer.tracking.outbox import Outbox
from trainer.tracking.progress_file import ProgressFile
from trainer.training.loop import train
from trainer.training.step_sync import StepSync
from trainer.worker import identity

WORKERS = 2
NORMS = ("none", "sync")
WARM_UP = 5
"""Number of steps that are not counted."""
TIMEOUT_SECONDS = 120
"""Time limit of one turn."""
SPEC = {
    "model": {"name": "torchvision:resnet18"},
    "data": {
        "name": "synthetic",
        "shape": [3, 64, 64],
        "classes": 10,
        "train_samples": 512,
        "test_samples": 16,
    },
    "num_workers": WORKERS,
    "global_batch_size": 16,
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "eval_every": 1_000_000,
}


class Turns:
    """Turns of two threads that run alternately until one of them ends."""

    def __init__(self, first: int) -> None:
        self._changed, self._turn, self._alone = threading.Condition(), first, False

    def take(self, thread: int) -> None:
        """Wait for the turn of this thread."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: self._turn == thread or self._alone, timeout=TIMEOUT_SECONDS
            )

    def pass_on(self, thread: int, *, at_end: bool = False) -> None:
        """Give the turn to the other thread."""
        with self._changed:
            self._turn, self._alone = 1 - thread, self._alone or at_end
            self._changed.notify_all()


class Timed:
    """Dataset that times steps, from the delivery of its batches to the next request, and takes turns with
    another one.
    """

    def __init__(self, dataset: Dataset, turns: Turns, thread: int) -> None:
        self._dataset, self._turns, self._thread = dataset, turns, thread
        self.seconds: list[float] = []
        self.shape, self.classes, self.digest = dataset.shape, dataset.classes, dataset.digest
        self.class_names = dataset.class_names
        self.test, self.close = dataset.test, dataset.close

    @property
    def skipped_images(self) -> frozenset[str]:
        """See Dataset."""
        return self._dataset.skipped_images

    def train(self, first_step: int) -> Generator[list[Batch]]:
        """Yield batches."""
        batches = self._dataset.train(first_step)
        while True:
            self._turns.pass_on(self._thread)
            self._turns.take(self._thread)
            began = time.perf_counter()
            yield next(batches)
            self.seconds.append(time.perf_counter() - began)


class PreemptionNotice:
    """Preemption notices, requested as often and at the same cost as in Ray; there are none."""

    def is_preempted(self) -> bool:
        """Take part in a collective, and return False."""
        dist.all_reduce(torch.zeros(1))
        return False

    def is_stop_requested(self) -> bool:
        """Return False."""
        return False


def plain(spec: JobSpec, worker: RankInfo, dataset: Timed) -> None:
    """Train with a typical loop."""
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
    """Sum the seconds spent in parts that the plain loop does not have."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return run

    with (
        mock.patch.object(StepSync, "begin", timed("reading the loss and sending it", StepSync.begin)),
        mock.patch.object(StepSync, "finish", timed("waiting for the others' losses", StepSync.finish)),
        mock.patch.object(RankZeroLogger, "update", timed("progress file", RankZeroLogger.update)),
        mock.patch.object(LambdaLR, "step", timed("schedule", LambdaLR.step)),
    ):
        yield


def ours(spec: JobSpec, worker: RankInfo, dataset: Timed, folder: Path) -> None:
    """Train with this project's loop and everything that it does in addition to training."""
    outbox = Outbox(folder)
    metrics_logger: MetricsLogger = (
        RankZeroLogger(spec.steps, outbox, ProgressFile(folder, spec.steps, spec.global_batch_size))
        if worker.rank == 0
        else NullLogger()
    )
    checkpoints = Checkpoints(
        str(folder / "checkpoints"), spec.checkpoint, identity(spec, dataset.digest), worker
    )
    train(spec, worker, metrics_logger, dataset, checkpoints, PreemptionNotice())
    outbox.close()


def work(steps: int, norm: str, first: int) -> dict[str, Any]:
    """Time both loops on one worker.

    Loop number `first` (0: plain, 1: the trainer's) is built and run first.
    """
    rank, turns = dist.get_rank(), Turns(first)
    worker = RankInfo(rank, WORKERS, torch.device("cpu"))
    spec = JobSpec.model_validate(SPEC | {"steps": steps, "norm": norm})
    datasets = [
        Timed(open_dataset(spec, rank, WORKERS, worker.device, torch.float32), turns, thread)
        for thread in (0, 1)
    ]
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, accounts(spent), redirect_stdout(io.StringIO()):

        def run(thread: int) -> None:
            turns.take(thread)
            try:
                if thread == 0:
                    plain(spec, worker, datasets[0])
                else:
                    ours(spec, worker, datasets[1], Path(folder))
            finally:
                turns.pass_on(thread, at_end=True)

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(run, (0, 1)))
    for dataset in datasets:
        dataset.close()
    plain_seconds, our_seconds = (dataset.seconds[WARM_UP:] for dataset in datasets)
    ratios = [before / after for before, after in zip(plain_seconds, our_seconds, strict=False)]
    return {
        "plain": statistics.median(plain_seconds),
        "trainer": statistics.median(our_seconds),
        "ratio": statistics.median(ratios),
        "whole": statistics.mean(plain_seconds) / statistics.mean(our_seconds),
        "spent": {name: value / steps for name, value in spent.items()},
    }


def report(norm: str, launches: list[dict[str, Any]]) -> None:
    """Print the speed of both loops and their ratio over all launches."""
    for name in ("plain", "trainer"):
        seconds = sorted(launch[name] for launch in launches)
        fastest, slowest = (SPEC["global_batch_size"] / seconds[place] for place in (0, -1))
        middle = statistics.median(seconds)
        speed = SPEC["global_batch_size"] / middle
        print(
            f"{norm:5} {name:8} {speed:6.1f} samples/s ({slowest:.1f} to {fastest:.1f}), "
            f"{middle * 1e3:.1f} ms a step"
        )
    for name, words in (("ratio", "neighbouring steps"), ("whole", "all steps together")):
        ratios = sorted(launch[name] for launch in launches)
        print(
            f"{norm:5} trainer / plain, {words}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to "
            f"{ratios[-1]:.3f}), goal 0.98"
        )
    for part in launches[0]["spent"]:
        spent = statistics.median(launch["spent"][part] for launch in launches)
        print(f"{norm:5} {part}: {spent * 1e3:.2f} ms a step")


def launch(number: int, steps: int) -> dict[str, Any]:
    """Start the workers with torchrun once; return the results of rank 0 for each norm."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={WORKERS}",
        ]
        arguments = [f"--steps={steps}", f"--first={number % 2}", f"--found={path}"]
        subprocess.run([*command, __file__, *arguments], check=True, timeout=TIMEOUT_SECONDS * 10)
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def main() -> None:
    """Launch the workers repeatedly, or act as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30, help="of each loop in a launch")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.found is not None:
        dist.init_process_group("gloo")
        found = {norm: work(arguments.steps, norm, arguments.first) for norm in NORMS}
        if dist.get_rank() == 0:
            arguments.found.write_text(json.dumps(found))
        dist.destroy_process_group()
        return
    launches = [launch(number, arguments.steps) for number in range(arguments.launches)]
    for norm in NORMS:
        report(norm, [found[norm] for found in launches])


if __name__ == "__main__":
    main()
