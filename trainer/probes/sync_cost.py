"""Cost of synchronised statistics: time of a step, and of its collectives."""

import time
from collections import deque
from collections.abc import Sequence
from statistics import median

import torch

from trainer.distributed import RankInfo

MAX_STEPS = 100
"""Number of last steps whose median duration is the time of a step."""
REPETITIONS = 3
"""Number of times that the collectives of a step are issued; the fastest counts."""


class StepTimer:
    """Duration of training steps, without data loading, probes and evaluation."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=MAX_STEPS)
        self._began = 0.0

    def begin(self) -> None:
        """Start a step."""
        self._began = time.perf_counter()

    def end(self) -> None:
        """End the step."""
        self._seconds.append(time.perf_counter() - self._began)

    @property
    def seconds(self) -> float:
        """Median over the last steps; NaN before the first one has ended."""
        return median(self._seconds) if self._seconds else float("nan")


def sync_cost(channels: Sequence[int], step_seconds: float, worker: RankInfo) -> dict[str, float]:
    """Return the times of a step and of the collectives of synchronised statistics.

    A synchronised layer issues one all_reduce of 8·(2C + 2) bytes forward and one backward. Here they are
    issued one after another without computations in between; arithmetic and waits for slower workers are not
    included. Values are the maxima over workers, and equal on every worker.

    Collectives: two all_reduces per layer and repetition, one before them, and one all_gather of 16 bytes.

    Args:
        channels: channels of each layer.
        step_seconds: time of a step on this worker.
        worker: this worker.
    """
    vectors = [
        torch.zeros(2 * count + 2, dtype=torch.float64, device=worker.device)
        for count in channels
        for _ in ("forward", "backward")
    ]
    rounds = []
    for _ in range(REPETITIONS):
        worker.all_reduce(torch.zeros(1, dtype=torch.float64, device=worker.device))  # workers begin together
        _wait(worker.device)
        began = time.perf_counter()
        for vector in vectors:
            worker.all_reduce(vector)
        _wait(worker.device)
        rounds.append(time.perf_counter() - began)
    own = torch.tensor([step_seconds, min(rounds)], dtype=torch.float64, device=worker.device)  # (2,)
    step, sync = torch.stack(worker.all_gather(own)).amax(0).tolist()
    return {"step_seconds": step, "sync_seconds": sync}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
