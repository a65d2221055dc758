"""Processor time of a training step on a CPU with the allocation settings of workers, and without.

A ResNet-18 of torchvision trains on random images of 64 x 64, with one thread. Each round starts a process
with glibc's defaults and one with `trainer.worker_settings.CPU_VARIABLES`, in turn. Printed are medians and
ranges over the rounds.

    python benchmarks/allocation.py                  # two minutes
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
import torchvision

from trainer.worker_settings import CPU_VARIABLES

WARM_UP, STEPS, BATCH = 5, 20, 16


def measure() -> dict[str, float]:
    """Return processor time and page faults of a step, and the peak memory of this process."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 64, 64), torch.randint(0, 10, (BATCH,))
    before = resource.getrusage(resource.RUSAGE_SELF)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            before = resource.getrusage(resource.RUSAGE_SELF)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return {
        "ms": (after.ru_utime - before.ru_utime + system) * 1000 / STEPS,
        "system ms": system * 1000 / STEPS,
        "page faults": (after.ru_minflt - before.ru_minflt) / STEPS,
        "peak MB": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure()))
        return
    plain = {name: value for name, value in os.environ.items() if name not in CPU_VARIABLES}
    environments = {"defaults of glibc": plain, "settings of workers": plain | CPU_VARIABLES}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in environments}
    for _ in range(options.rounds):
        for name, environment in environments.items():
            command = [sys.executable, __file__, "--measure"]
            run = subprocess.run(
                command, env=environment | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE
            )
            found[name].append(json.loads(run.stdout))
    for name, rounds in found.items():
        for figure in rounds[0]:
            values = [each[figure] for each in rounds]
            text = f"{statistics.median(values):9.1f} ({min(values):.1f} to {max(values):.1f})"
            print(f"{name:20} {figure:12} {text}")
    defaults, settings = found.values()
    ratios = [ours["ms"] / theirs["ms"] for ours, theirs in zip(settings, defaults, strict=True)]
    text = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    print(f"processor time, settings to defaults, by rounds: {text}")


if __name__ == "__main__":
    main()
