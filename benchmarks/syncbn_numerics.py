"""Error of the synchronised layer compared with float64 batch normalisation of all data on one device.

Four ranks hold 3, 5, 0 and 9 samples of 8 channels of 64 x 64; ranks differ in mean, channels in spread.
Prints the maximum errors of output, input gradient and variance, as fractions of the maximum expected value,
for each dtype and distance of the mean from zero in standard deviations, and the error of E[x²] - E[x]² in
float32 on the same data.

    python benchmarks/syncbn_numerics.py     # about a minute
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from syncbn import sync_batch_norm

COUNTS = [3, 5, 0, 9]
CHANNELS = 8
SIDE = 64
CASES = [
    *((torch.float64, shift) for shift in (0.0, 1e2, 1e4)),
    *((torch.float32, shift) for shift in (0.0, 3.0, 1e2, 1e4)),
    (torch.bfloat16, 0.0),
    (torch.float16, 0.0),
]


def draw(dtype: torch.dtype, shift: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return the input and output gradient of each rank, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(1.0, 2.0, CHANNELS, dtype=torch.float64).view(1, -1, 1, 1)
    shapes = [(count, CHANNELS, SIDE, SIDE) for count in COUNTS]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    shards = [(value + 0.3 * rank + shift) * spread for rank, value in enumerate(values)]
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [shard.to(dtype) for shard in shards], [gradient.to(dtype) for gradient in gradients]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return (
        ((actual.to(torch.float64) - expected).abs().max() / expected.abs().max()).item()
        if actual.numel()
        else 0.0
    )


def measure(dtype: torch.dtype, shift: float) -> list[float]:
    """Return the maximum errors over the ranks, on every rank."""
    shards, gradients = draw(dtype, shift)
    x = torch.cat(shards).to(torch.float64)
    # The single device subtracts the mean first: even float64 would lose digits to a shift of 1e4.
    centred = (x - x.mean((0, 2, 3), keepdim=True)).requires_grad_()
    variance = centred.detach().var((0, 2, 3), correction=0)
    y = F.batch_norm(centred, None, None, training=True)
    y.backward(torch.cat(gradients).to(torch.float64))
    assert centred.grad is not None
    rank = dist.get_rank()
    own = shards[rank].requires_grad_()
    output, moments = sync_batch_norm(own)
    output.backward(gradients[rank])
    assert own.grad is not None
    errors = [
        relative_error(output.detach(), y.detach().split(COUNTS)[rank]),
        relative_error(own.grad, centred.grad.split(COUNTS)[rank]),
        relative_error(moments.variance, variance),
    ]
    values = x.to(torch.float32)
    naive = values.square().mean((0, 2, 3)) - values.mean((0, 2, 3)).square()
    everyone: list[list[float]] = [[]] * len(COUNTS)
    dist.all_gather_object(everyone, errors)
    return [*(max(column) for column in zip(*everyone, strict=True)), relative_error(naive, variance)]


def work(rank: int, store: Path, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(COUNTS))
    for dtype, shift in CASES:
        errors = measure(dtype, shift)
        if rank == 0:
            results.put(errors)
    dist.destroy_process_group()


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"torch {torch.__version__}, {len(COUNTS)} ranks over gloo; largest relative errors")
    print(f"{'input':10} {'mean/std':>8}  {'y':>8} {'dx':>8} {'variance':>8}   E[x²]-E[x]² in float32")
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(work, (Path(folder, "store"), results), nprocs=len(COUNTS), join=False)
        for dtype, shift in CASES:
            *errors, naive = results.get()
            last = f"{naive:8.1e}" if dtype == torch.float32 else ""
            columns = " ".join(f"{error:8.1e}" for error in errors)
            print(f"{str(dtype).removeprefix('torch.'):10} {shift:8g}  {columns}   {last}", flush=True)
        while not processes.join():
            pass


if __name__ == "__main__":
    main()
