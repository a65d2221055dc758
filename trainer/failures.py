"""Failure records of the workers, and the first cause among them."""

import json
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from trainer.atomic import atomic_write
from trainer.driver.supervisor import ProcessExit
from trainer.errors import Diverged, RunError
from trainer.failure_kinds import classify, classify_exit, message, printable
from trainer.jobspec import FailureKind, FileModel, Outcome
from trainer.processes import describe_status

if TYPE_CHECKING:  # the driver does not import torch
    from trainer.checkpoint.state import TrainProgress

MAX_TRACEBACK_CHARS = 20_000
"""Maximum length of a traceback; the end, which has the error, is kept."""
EXIT_SECONDS = 5.0
"""Time for the exit record of a dead worker to appear; a lost node never writes it."""
POLL_SECONDS = 0.1


class Failure(FileModel):
    """Failure record of one worker."""

    rank: int
    step: int
    """Optimiser steps that it had completed."""
    cause: FailureKind
    is_consequence: bool
    """Whether another worker's failure, which is then the first one, can have caused it."""
    reason: str
    traceback: str
    seconds: float
    """Time of the failure, in seconds since 1970."""


@dataclass(frozen=True)
class Death:
    """End of a worker without a failure record."""

    detail: str
    """Message of Ray."""
    out_of_memory: bool = False
    """Whether Ray ended it for lack of memory."""
    exit: ProcessExit | None = None
    """Exit record; None if the supervisor was lost too."""


def record(folder: Path, error: BaseException, rank: int, step: int) -> str:
    """Write the failure record of this worker and return the reason.

    An existing record is kept, since the first error is the cause. Never raises: an error that cannot be
    shown or stored must not hide the failure.
    """
    try:
        cause, is_consequence = classify(error)
        reason = message(error)
        if not isinstance(error, RunError):
            reason = f"worker {rank}: {type(error).__name__}: {reason}"
    except Exception:  # attributes of the error may raise
        cause, is_consequence, reason = "user_code", False, f"worker {rank}: an error that cannot be shown"
    # Divergence is found after the step that caused it.
    step = error.step if isinstance(error, Diverged) else step
    failure = Failure(
        rank=rank,
        step=step,
        cause=cause,
        is_consequence=is_consequence,
        reason=printable(reason.strip()),
        traceback=_traceback(error),
        seconds=time.time(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Errors on the way out, such as a closed process group, come later.
        if not (folder / f"rank-{rank:05d}.json").exists():
            atomic_write(folder / f"rank-{rank:05d}.json", failure.model_dump_json())
    except OSError as full:
        print(f"warning: could not write the failure record: {full}; {failure.reason}", flush=True)
    return failure.reason


def _traceback(error: BaseException) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:
        return "a traceback that cannot be shown"
    return printable(text[-MAX_TRACEBACK_CHARS:], MAX_TRACEBACK_CHARS)


@contextmanager
def recorded(folder: Path, rank: int, position: "TrainProgress") -> Iterator[None]:
    """Record errors inside immediately, except Diverged, and let them pass."""
    try:
        yield
    # Every worker raises it in the same step, and the run counts as finished.
    except Diverged:
        raise
    except BaseException as error:
        record(folder, error, rank, position.step)
        raise


def read(folder: Path) -> list[Failure]:
    """Read the records of all workers, ordered by time."""
    failures = []
    for path in folder.glob("rank-*.json"):
        try:
            failures.append(Failure.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError):
            continue
    return sorted(failures, key=lambda failure: failure.seconds)


def note_process(folder: Path, rank: int) -> None:
    """Record the process of the worker of this rank, to find its exit record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"process-{rank:05d}").write_text(f"exit-{socket.gethostname()}-{os.getpid()}.json")


def has_processes(folder: Path) -> bool:
    """Return whether any worker has started."""
    return next(folder.glob("process-*"), None) is not None


def find_exits(folder: Path, ranks: Sequence[int]) -> dict[int, ProcessExit]:
    """Return the exit records of dead workers, after at most `EXIT_SECONDS`."""
    deadline = time.monotonic() + EXIT_SECONDS
    exits: dict[int, ProcessExit] = {}
    while True:
        for rank in ranks:
            with suppress(OSError, ValueError, TypeError):
                name = (folder / f"process-{rank:05d}").read_text()
                exits[rank] = ProcessExit(**json.loads((folder / name).read_bytes()))
        if len(exits) == len(ranks) or time.monotonic() > deadline:
            return exits
        time.sleep(POLL_SECONDS)


def explain(failures: Sequence[Failure], deaths: Mapping[int, Death], *, step: int) -> Outcome:
    """Return the outcome of the first failure.

    This is a failure that no other one can have caused, otherwise a death, otherwise a hang.

    Args:
        failures: failure records of the workers, ordered by time.
        deaths: workers that ended without a record, by rank.
        step: completed steps, for a worker without a record.
    """
    # Clocks of nodes differ, so a cause comes before consequences regardless of time.
    first = next((failure for failure in failures if not failure.is_consequence), None)
    if first is None and deaths:
        # Deaths with an exit record first, by time; the rank makes the choice deterministic.
        rank, death = min(
            deaths.items(), key=lambda item: (item[1].exit.seconds if item[1].exit else float("inf"), item[0])
        )
        return _explain_death(rank, death, step)
    first = (
        first
        or next((failure for failure in failures if failure.cause == "hang"), None)
        or next(iter(failures), None)
    )
    if first is None:
        return Outcome(
            state="failed", reason="the workers ended without a failure record", cause="unknown", step=step
        )
    return Outcome(
        state="failed",
        reason=first.reason,
        cause=first.cause,
        rank=first.rank,
        step=first.step,
        traceback=first.traceback,
    )


def _explain_death(rank: int, death: Death, step: int) -> Outcome:
    if death.exit is None:
        cause: FailureKind = "out_of_memory" if death.out_of_memory else "worker_lost"
        reason = f"worker {rank} was lost: {printable(death.detail)}"
    else:
        out_of_memory = death.out_of_memory or death.exit.out_of_memory
        cause = classify_exit(
            death.exit.status, out_of_memory=out_of_memory, orphaned=death.exit.orphaned, detail=death.detail
        )
        reason = f"worker {rank}: its process {describe_status(death.exit.status)}"
        if out_of_memory:
            reason += ": the node was out of memory"
        elif death.exit.orphaned:
            reason += " after its node's Ray had ended"
        elif "SIGTERM" in death.detail:
            reason += " upon signal 15 (Terminated)"
    return Outcome(state="failed", reason=reason, cause=cause, rank=rank, step=step)
