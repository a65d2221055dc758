"""Times of layers that share one message (`apply_together`) against the same layers one by one, on CPUs.

Two gloo ranks of one thread each, forward and backward, interleaved. `resnet` are the last layer of the main
path and the downsampling path of a block, `inception` the layers of four branches.

    python benchmarks/syncbn_siblings.py             # about half a minute
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from syncbn import SyncBatchNorm, apply_together

CASES = {
    "resnet, small": [(4, 256, 7, 7)] * 2,
    "resnet": [(8, 256, 28, 28)] * 2,
    "inception, small": [(4, channels, 7, 7) for channels in (384, 384, 448, 192)],
    "inception": [(8, channels, 17, 17) for channels in (192, 160, 160, 192)],
}


def one_by_one(layers: list[SyncBatchNorm], xs: list[Tensor]) -> list[Tensor]:
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


def work(rank: int, store: Path, results: Any, repeats: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, shapes in CASES.items():
        layers = [SyncBatchNorm(shape[1]) for shape in shapes]
        xs = [torch.randn(shape).requires_grad_() for shape in shapes]
        dys = [torch.randn(shape) for shape in shapes]
        times: dict[str, list[float]] = {"one by one": [], "together": []}
        for repeat in range(repeats + 5):
            for kind, apply in (("one by one", one_by_one), ("together", apply_together)):
                dist.barrier()
                started = time.perf_counter()
                torch.autograd.backward(apply(layers, xs), dys)
                if repeat >= 5:
                    times[kind].append(1e3 * (time.perf_counter() - started))
        if rank == 0:
            results.put((name, times))
    dist.destroy_process_group()


def describe(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:6.2f} [{low:5.2f}, {high:5.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; milliseconds, median [quartiles]")
    print(f"{'layers':18} {'one by one':21} {'together':21} ratio of the medians")
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").SimpleQueue()
        arguments = (Path(folder, "store"), results, options.repeats)
        processes = mp.spawn(work, arguments, nprocs=2, join=False)
        for _ in CASES:
            name, times = results.get()
            ratio = statistics.median(times["together"]) / statistics.median(times["one by one"])
            print(f"{name:18} {describe(times['one by one'])} {describe(times['together'])} {ratio:5.2f}")
        while not processes.join():
            pass


if __name__ == "__main__":
    main()
