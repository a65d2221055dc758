"""Delay of a step by a checkpoint, compared with a copy of the state and a blocking torch.save with fsync.

The states of the networks, with momentum, have about 100 and 300 MB. One process measures the three kinds
in turn and prints median and range in ms.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

from trainer.atomic import to_disk
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress, TrainState
from trainer.distributed import RankInfo
from trainer.jobspec import CheckpointSpec, JobSpec, MlpSpec
from trainer.models import build_model
from trainer.probes import Probes
from trainer.training.optim import build_optimizer, build_schedule

WIDTHS = {"100 MB": 3_000, "300 MB": 5_700}
SHAPE, CLASSES, BATCH = (1, 28, 28), 10, 8


def build_state(width: int) -> TrainState:
    """Build a network and an optimizer with momentum buffers."""
    spec = JobSpec(
        steps=1, norm="none", model=MlpSpec(hidden=[width, width]), optimizer={"momentum": 0.9, "lr": 1e-3}
    )
    worker, position = RankInfo(0, 1, torch.device("cpu")), TrainProgress(schedule_end=1)
    model = build_model(spec.model, spec.norm, SHAPE, CLASSES, 0)
    optimizer = build_optimizer(spec.optimizer, model)
    schedule = build_schedule(spec.lr_schedule, optimizer, position)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, optimizer, schedule, scaler, Probes(spec, model, worker), position, worker)
    step(state)
    return state


def step(state: TrainState) -> None:
    """Make one optimizer step."""
    state.optimizer.zero_grad(set_to_none=True)
    inputs, labels = torch.rand(BATCH, *SHAPE), torch.randint(CLASSES, (BATCH,))
    F.cross_entropy(state.model(inputs), labels).backward()
    state.optimizer.step()
    state.position.step += 1


def copy(state: TrainState) -> list[torch.Tensor]:
    """Copy all parameters and momentum buffers."""
    return [
        tensor.detach().clone()
        for parameter, buffers in state.optimizer.state.items()
        for tensor in (parameter, *buffers.values())
    ]


def save_blocking(state: TrainState, path: Path) -> None:
    """Write the state by torch.save and sync it to disk."""
    with path.open("wb") as file:
        torch.save({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, file)
        to_disk(file)


def milliseconds(function: Callable[[], object]) -> float:
    """Time a call; its result is freed afterwards."""
    began = time.perf_counter()
    kept = function()
    passed = 1e3 * (time.perf_counter() - began)
    del kept
    return passed


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, width in WIDTHS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(name, build_state(width), Path(folder), arguments.rounds)


def measure(name: str, state: TrainState, folder: Path, rounds: int) -> None:
    """Measure all kinds in turn, each followed by a step, and print them."""
    checkpoints = Checkpoints(str(folder / "checkpoints"), CheckpointSpec(), {}, state.worker)
    kinds: dict[str, Callable[[], object]] = {
        "plain copy": lambda: copy(state),
        "checkpoint, in the step": lambda: checkpoints.save(state),
        "torch.save and fsync": lambda: save_blocking(state, folder / "blocking.pt"),
    }
    times: dict[str, list[float]] = {kind: [] for kind in (*kinds, "checkpoint, until it exists")}
    for number in range(rounds + 1):
        for kind, function in kinds.items():
            began = time.perf_counter()
            passed = milliseconds(function)
            if number > 0:  # the first round warms up
                times[kind].append(passed)
            checkpoints.wait()
            if number > 0 and function is kinds["checkpoint, in the step"]:
                times["checkpoint, until it exists"].append(1e3 * (time.perf_counter() - began))
            step(state)
    size = sum(tensor.nbytes for tensor in copy(state)) / 1e6
    print(f"state of {size:.0f} MB ({name}), {rounds} rounds, ms: median (range)")
    base = statistics.median(times["plain copy"])
    for kind, values in times.items():
        middle = statistics.median(values)
        print(
            f"  {kind:28} {middle:7.1f} ({min(values):.1f} to {max(values):.1f})   {middle / base:5.2f} of "
            "the copy"
        )


if __name__ == "__main__":
    main()
