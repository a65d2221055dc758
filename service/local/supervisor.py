"""Supervisor of several programs, which all end when one of them ends.

They also end when the process that started them ends.

    asker --pipe--> guard --pipe--> keeper --> the parts, each in a session of its own, writing to a log of its own

`SupervisorHandle` is the asker's end. Guard and keeper are `python -m service.local.supervisor`: the plan is one line of JSON on
standard input, which then stays open, and whose end means stop; standard output carries events, and its end means that no process
is left.
Each of the two adopts what its descendants leave behind (a Linux "child subreaper"), so a daemon that left its session and
its parent is still found, and either of them can be killed without anything surviving it.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.processes import GRACE_SECONDS, Descendants, describe_status

VITAL_SECONDS = 1.0  # between two looks at the vital children


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """Process to run.

    `stop_seconds` is what it gets between SIGTERM and SIGKILL; the end of a child that runs one of the programs `required_children`
    counts as its own, for it may take long to notice, or never do.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: str
    stop_seconds: float = 3
    required_children: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Processes in start order (stopped in reverse), and paths to remove at the end."""

    parts: Sequence[ProcessSpec]
    directory: str
    remove: Sequence[str] = ()


@dataclass(frozen=True)
class VitalChild:
    """Child process that a process cannot work without."""

    part: str
    parent: int
    """Process id of the part."""
    name: str
    end: int
    """A pidfd, readable once the child has ended."""


class SupervisorHandle:
    """Handle of a supervisor: `ended` is set when a process has died (`reason`) or all have stopped."""

    def __init__(self, plan: Plan, *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        self.ended = threading.Event()
        self.process_ids: dict[str, int] = {}
        self.dead_part: str | None = None
        self.reason: str | None = None
        self._stopping = False
        with log.open("wb") as errors:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "service.local.supervisor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C in a terminal reaches its whole foreground group; the asker alone decides
            )
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):  # a guard that is already dead is found by the reader
            self._guard.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
            self._guard.stdin.flush()
        self._reader = threading.Thread(target=self._read_events, name="keeper events", daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """Ask the supervisor to stop, and return when no process is left."""
        self._stopping = True
        assert self._guard.stdin is not None
        with suppress(BrokenPipeError):
            self._guard.stdin.close()
        self._reader.join()
        self._guard.wait()

    def _read_events(self) -> None:
        assert self._guard.stdout is not None
        with self._guard.stdout as events:
            for line in events:
                event = json.loads(line)
                self.process_ids |= event.get("started", {})
                if "dead" in event:
                    self.dead_part, self.reason = event["dead"], event["reason"]
                    self.ended.set()
        if not self._stopping and self.reason is None:
            self.reason = "the keeper of the processes ended without a word"
        self.ended.set()


def main() -> None:
    """Run the guardian, which forks the supervisor."""
    line = sys.stdin.buffer.readline()
    if not line:
        return
    fields = json.loads(line)
    plan = Plan(**fields | {"parts": [ProcessSpec(**part) for part in fields["parts"]]})
    lifeline, guard_end = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(guard_end)
        keep(plan, lifeline)
    else:
        os.close(lifeline)
        guard(plan, keeper, guard_end)
    for path in plan.remove:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            Path(path).unlink()


def guard(plan: Plan, keeper: int, lifeline: int) -> None:
    """Pass a stop request on to the supervisor, and end its descendants if it was killed."""
    descendants = Descendants()
    is_asked = False
    while not is_asked and keeper not in descendants.ended:
        is_asked = descendants.wait(lifeline=sys.stdin.fileno())
    os.close(lifeline)
    if status := descendants.ended.get(keeper, 0):
        report(dead="keeper", reason=f"the keeper of the processes {describe_status(status)}")
    descendants.wait_for_end(keeper, sum(part.stop_seconds for part in plan.parts) + 2 * GRACE_SECONDS)
    end_all(descendants)


def keep(plan: Plan, lifeline: int) -> None:
    """Start the processes, wait until one dies or the lifeline closes, then stop all in reverse order."""
    descendants = Descendants()
    running: list[tuple[subprocess.Popen[bytes], ProcessSpec]] = []
    is_asked = False
    for part in plan.parts:
        try:
            running.append((start(part, plan.directory), part))
        except OSError as error:
            report(dead=part.name, reason=f"{part.name} could not be started: {error}")
            is_asked = True
            break
    report(started={part.name: process.pid for process, part in running})
    vital: dict[psutil.Process, VitalChild] = {}
    while not is_asked:
        ends = [child.end for child in vital.values()]
        is_asked = descendants.wait(lifeline=lifeline, ends=ends, timeout_seconds=VITAL_SECONDS)
        lost = dead_child(vital)
        if lost:  # the kernel may end it with its parent, before the end of the parent can be seen
            descendants.wait_for_end(lost.parent, 0.1)
        dead = [(part, descendants.ended[process.pid]) for process, part in running if process.pid in descendants.ended]
        if dead and not is_asked:
            part, status = dead[0]
            report(dead=part.name, reason=f"{part.name} {describe_status(status)}")
            is_asked = True
        elif lost and not is_asked:
            report(dead=lost.part, reason=f"{lost.part} lost its {lost.name}")
            is_asked = True
        note_children(running, vital)
    for process, part in reversed(running):
        descendants.stop(process.pid, part.stop_seconds)
    end_all(descendants)


def note_children(
    running: Sequence[tuple[subprocess.Popen[bytes], ProcessSpec]], vital: dict[psutil.Process, VitalChild]
) -> None:
    """Record new required children."""
    for process, part in running:
        if part.required_children:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                for child in psutil.Process(process.pid).children():
                    if child not in vital and (name := child.name()) in part.required_children:
                        vital[child] = VitalChild(part.name, process.pid, name, os.pidfd_open(child.pid))


def dead_child(vital: dict[psutil.Process, VitalChild]) -> VitalChild | None:
    """Return the first required child that has ended, or None."""
    ended, _, _ = select.select([child.end for child in vital.values()], [], [], 0)
    return next((child for child in vital.values() if child.end in ended), None)


def start(part: ProcessSpec, directory: str) -> subprocess.Popen[bytes]:
    """Start a process. `Descendants` collects its status, and the `Popen` must stay referenced."""
    with Path(part.log).open("wb") as log:
        return subprocess.Popen(
            part.command,
            env=part.environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,  # databases, logs and models are for their owner alone
        )


def end_all(descendants: Descendants) -> None:
    """End all descendants, and report those that cannot be ended."""
    if left := descendants.end():
        report(left=left)


def report(**event: Any) -> None:
    """Write one event, also if no reader is left."""
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    main()
