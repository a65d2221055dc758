"""Communication cost of synchronised ResNet-50 statistics on 2 to 1,024 ranks: counts, and a stated model.

Counted: collectives and bytes of a training step on torch's fake process group, at each number of ranks.
Computed: their time by an alpha-beta model (each hop costs alpha, each byte beta). Links and compute steps
are assumptions, which are printed with the table. Not modelled: ranks that wait for a slower one,
contention with the gradients of DDP, and links of several levels. The times are orders of magnitude that
show where synchronisation is cheap and where it is not.
"""

import argparse
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from syncbn_model import Collectives
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from syncbn import SyncBatchNorm, convert_sync_batchnorm

WORLD_SIZES = [2**power for power in range(1, 11)]
STEPS_MS = (13.0, 100.0)
"""Assumed compute steps: 32 images of 224 x 224 at 2,500 images/s, and a detector on two large images."""
SHARE = 0.1
"""Share of the compute step above which the last lines of the table call communication expensive."""


@dataclass(frozen=True)
class Link:
    """Link between ranks; all figures are assumptions."""

    name: str
    call_seconds: float
    """Fixed cost of issuing a collective: host, launch, synchronisation."""
    hop_seconds: float
    """Alpha: latency of one message."""
    bytes_per_second: float
    """1 / beta, in one direction."""
    most_ranks: int

    def ring_seconds(self, size: float, world_size: int) -> float:
        """Compute the time of an all_reduce in 2(W - 1) hops of size/W bytes each."""
        return self.call_seconds + 2 * (world_size - 1) * (
            self.hop_seconds + size / world_size / self.bytes_per_second
        )

    def tree_seconds(self, size: float, world_size: int) -> float:
        """Compute the time of an all_reduce up and down a binary tree, in 2·log₂W hops of the whole
        vector.
        """
        return self.call_seconds + 2 * math.ceil(math.log2(world_size)) * (
            self.hop_seconds + size / self.bytes_per_second
        )


LINKS = [
    Link("NVLink within a node", 10e-6, 1e-6, 200e9, 8),
    Link("InfiniBand, RDMA", 15e-6, 4e-6, 20e9, 1024),
    Link("Ethernet, TCP", 40e-6, 30e-6, 2.5e9, 1024),
]


class AlikeRanks(Collectives):
    """Counter of collectives on the fake process group that fills in the result of W equal ranks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record the operator; multiply the tensors of an all_reduce by W, the sum over equal
        ranks.
        """
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.name() == "c10d::allreduce_":
            for tensor in args[0]:
                tensor.mul_(dist.get_world_size())
        return result


def count(world_size: int) -> tuple[list[int], list[int]]:
    """Return the channels of each synchronised layer and the bytes of each collective of one training
    step.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        torch.manual_seed(0)
        model = convert_sync_batchnorm(torchvision.models.resnet50(num_classes=10))
        with AlikeRanks() as collectives:
            loss = model(torch.randn(2, 3, 32, 32)).square().mean()
            collectives.phase = "backward"
            loss.backward()
    finally:
        dist.destroy_process_group()
    channels = [layer.num_features for layer in model.modules() if isinstance(layer, SyncBatchNorm)]
    for sizes in collectives.bytes.values():
        assert len(sizes) == len(channels), "a layer does not issue one collective forward and one backward"
    return channels, [size for sizes in collectives.bytes.values() for size in sizes]


def gathered_bytes(channels: list[int], world_size: int) -> float:
    """Compute the bytes that a rank receives per step with torch's layer.

    float32, all_gather in forward, all_reduce in backward.
    """
    forward = sum((world_size - 1) * 4 * (2 * number + 1) for number in channels)
    return forward + reduced_bytes([4 * 2 * number for number in channels], world_size)


def reduced_bytes(sizes: list[int], world_size: int) -> float:
    """Compute the bytes that a rank receives in all_reduces along a ring."""
    return sum(sizes) * 2 * (world_size - 1) / world_size


def report_counts(counts: dict[int, tuple[list[int], list[int]]]) -> None:
    print(
        "ResNet-50, float32, one step; received by each rank in ring all_reduces, and by "
        "torch.nn.SyncBatchNorm's"
    )
    print("all_gather (computed from its source):\n")
    print("| ranks | collectives | bytes in them | MB received | MB received, torch's |")
    print("|---|---|---|---|---|")
    for world_size, (channels, sizes) in counts.items():
        received, gathered = reduced_bytes(sizes, world_size), gathered_bytes(channels, world_size)
        print(
            f"| {world_size:,} | {len(sizes)} | {sum(sizes):,} | {received / 1e6:.2f} | "
            f"{gathered / 1e6:.2f} |"
        )


def report_link(
    link: Link, counts: dict[int, tuple[list[int], list[int]]], gradient: int, steps_ms: list[float]
) -> None:
    print(
        f"\n{link.name}: {link.call_seconds * 1e6:g} µs a call, {link.hop_seconds * 1e6:g} µs a hop, "
        f"{link.bytes_per_second / 1e9:g} GB/s\n"
    )
    shares = [f"of a {step:g} ms step" for step in steps_ms]
    print("| " + " | ".join(["ranks", "ring ms", "tree ms", *shares, "gradients, ring ms"]) + " |")
    print("|---" * (len(shares) + 4) + "|")
    dear: dict[float, int] = {}
    for world_size, ring, tree in times(link, counts):
        best = min(ring, tree)
        for step in steps_ms:
            if best > SHARE * step:
                dear.setdefault(step, world_size)
        row = [f"{world_size:,}", f"{ring:.2f}", f"{tree:.2f}", *(f"{best / step:.0%}" for step in steps_ms)]
        print("| " + " | ".join([*row, f"{link.ring_seconds(gradient, world_size) * 1e3:.1f}"]) + " |")
    print()
    for step in steps_ms:
        where = f"from {dear[step]:,} ranks on" if step in dear else "at no number of ranks here"
        print(f"more than {SHARE:.0%} of a {step:g} ms step: {where}")


def times(link: Link, counts: dict[int, tuple[list[int], list[int]]]) -> Iterator[tuple[int, float, float]]:
    """Yield (ranks, milliseconds by ring, milliseconds by tree) of the collectives of all layers of a
    step.
    """
    for world_size, (_, sizes) in counts.items():
        if world_size <= link.most_ranks:
            ring = sum(link.ring_seconds(size, world_size) for size in sizes)
            tree = sum(link.tree_seconds(size, world_size) for size in sizes)
            yield world_size, ring * 1e3, tree * 1e3


def gradient_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--step-ms", type=float, nargs="+", default=list(STEPS_MS), help="compute steps to compare with"
    )
    arguments = parser.parse_args()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    counts = {world_size: count(world_size) for world_size in WORLD_SIZES}
    report_counts(counts)
    for link in LINKS:
        report_link(link, counts, gradient_bytes(torchvision.models.resnet50()), arguments.step_ms)
