"""Why a run failed: classified on the worker where it happened, and the first cause found among all workers' records."""

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError

from syncbn import DesyncError
from trainer.errors import Diverged, RunError
from trainer.files import write_whole
from trainer.spec import Cause, Frozen, Outcome
from trainer.state import Position

LONGEST_TRACEBACK = 20_000
"""Characters; of a longer one the end is kept, which names the error."""
CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "remote process exited",
    "communicator was aborted",
)
GROUP_GONE = "process group has not been initialized"
"""Ray destroys the surviving workers' process group, from another thread, when a worker has died."""
TIMED_OUT = ("timed out", "timeout")


class Failure(Frozen):
    """What one worker met."""

    rank: int
    step: int
    """Optimiser steps that it had done."""
    cause: Cause
    is_consequence: bool
    """Whether it can have been drawn after by another worker's failure: that one's is the first."""
    reason: str
    traceback: str
    seconds: float
    """When, in seconds since 1970."""


def classify(error: BaseException) -> tuple[Cause, bool]:
    """Tell an error's cause, and whether it can be the consequence of another worker's failure.

    What neither this project nor torch names is the user's code: an error of the model, or one that the spec led to.
    """
    text = str(error).lower()
    if isinstance(error, RunError):
        return error.cause, False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "out_of_memory", False
    if isinstance(error, DesyncError):
        return "hang", True
    if type(error).__module__.partition(".")[0] == "ray":
        return ("out_of_memory" if type(error).__name__ == "OutOfMemoryError" else "worker_lost"), False
    if "dataloader" in text and isinstance(error, RuntimeError):
        # A loader's process that the kernel killed was most likely too large.
        is_killed, is_late = "killed by signal: killed" in text, "timed out" in text
        return ("out_of_memory" if is_killed else "hang" if is_late else "worker_lost"), False
    if isinstance(error, TimeoutError):
        return "hang", False
    if isinstance(error, ValueError) and GROUP_GONE in text:
        return "worker_lost", True
    is_of_torch = isinstance(error, (RuntimeError, ConnectionError)) and any(
        word in text for word in ("gloo", "nccl", "rendezvous", "store", "peer")
    )
    if is_of_torch and any(word in text for word in CONNECTION_LOST):
        return "worker_lost", True
    if is_of_torch and any(word in text for word in TIMED_OUT):
        return "hang", True
    return "user_code", False


def record(folder: Path, error: BaseException, rank: int, step: int) -> None:
    """Write down what this worker met, for the driver to compare."""
    cause, is_consequence = classify(error)
    step = error.step if isinstance(error, Diverged) else step
    reason = str(error) if isinstance(error, RunError) else f"worker {rank}: {type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:]
    failure = Failure(
        rank=rank,
        step=step,
        cause=cause,
        is_consequence=is_consequence,
        reason=reason.strip(),
        traceback=trace,
        seconds=time.time(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / f"rank-{rank:05d}.json").exists():
        return  # what came first is what is looked for
    write_whole(folder / f"rank-{rank:05d}.json", failure)


@contextmanager
def recorded(folder: Path, rank: int, position: Position) -> Iterator[None]:
    """Record what is raised inside, at once, and let it pass; to diverge is no failure."""
    try:
        yield
    except Diverged:
        raise
    except Exception as error:
        record(folder, error, rank, position.step)
        raise


def read(folder: Path) -> list[Failure]:
    """Read all workers' records, in the order of time."""
    failures = []
    for path in folder.glob("rank-*.json"):
        try:
            failures.append(Failure.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return sorted(failures, key=lambda failure: failure.seconds)


def explain(failures: list[Failure], deaths: Mapping[int, str], *, out_of_memory: bool, step: int) -> Outcome:
    """Make an outcome of the first failure: what no other can have caused, or else a death, or else a hang.

    Args:
        failures: the workers' own records, in the order of time.
        deaths: workers that ended without a word, and what Ray says of them.
        out_of_memory: whether Ray ended one of those for want of memory.
        step: steps known to be done, for a worker that cannot tell any more.
    """
    first = next((failure for failure in failures if not failure.is_consequence), None)
    if first is None and deaths:
        rank, words = min(deaths.items())
        cause: Cause = "out_of_memory" if out_of_memory else "worker_lost"
        return Outcome(state="failed", reason=f"worker {rank} was lost: {words}", cause=cause, rank=rank, step=step)
    first = (
        first or next((failure for failure in failures if failure.cause == "hang"), None) or next(iter(failures), None)
    )
    if first is None:
        return Outcome(state="failed", reason="the workers ended without a word", cause="worker_lost", step=step)
    return Outcome(
        state="failed",
        reason=first.reason,
        cause=first.cause,
        rank=first.rank,
        step=first.step,
        traceback=first.traceback,
    )
