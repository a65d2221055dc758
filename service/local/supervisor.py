"""Supervisor of several processes, which all end when one of them ends.

They also end when the process that started them ends.

    client --pipe--> guardian --pipe--> supervisor --> the processes, each in its own session, with its own
    log

`SupervisorHandle` is the client's side. Guardian and supervisor run `python -m service.local.supervisor`: the
plan is one line of JSON on standard input, which stays open until the client asks for a stop by closing it;
standard output carries events, and its end means that no process is left. Both adopt orphaned descendants (as
a Linux "child subreaper"), so that a daemon that left its session and its parent is still found, and either
of them can be killed without leaving a process behind.
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

VITAL_SECONDS = 1.0
"""Interval at which required children are listed."""


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """Process to run.

    `stop_seconds` is the time between SIGTERM and SIGKILL. The end of a child that runs one of the programs
    `required_children` counts as the end of the process, which may notice it late or never.
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

    processes: Sequence[ProcessSpec]
    directory: str
    remove: Sequence[str] = ()


@dataclass(frozen=True)
class VitalChild:
    """Child process that a process cannot work without."""

    part: str
    parent: int
    """Process id of the parent."""
    name: str
    end: int
    """pidfd that is readable once the child has ended."""


class SupervisorHandle:
    """Handle of a supervisor.

    `ended` is set when a process has died (`reason`) or all have stopped.
    """

    def __init__(self, plan: Plan, *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        self.ended = threading.Event()
        self.process_ids: dict[str, int] = {}
        self.dead_process: str | None = None
        self.reason: str | None = None
        self._stopping = False
        with log.open("wb") as errors:
            self._guardian = subprocess.Popen(
                [sys.executable, "-m", "service.local.supervisor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=pass_fds,
                start_new_session=True,  # else Ctrl-C in a terminal would reach it, too
            )
        assert self._guardian.stdin is not None
        with suppress(BrokenPipeError):  # the reader finds a guardian that is already dead
            self._guardian.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
            self._guardian.stdin.flush()
        self._reader = threading.Thread(target=self._read_events, name="supervisor events", daemon=True)
        self._reader.start()

    def stop(self) -> None:
        """Ask the supervisor to stop, and return when no process is left."""
        self._stopping = True
        assert self._guardian.stdin is not None
        with suppress(BrokenPipeError):
            self._guardian.stdin.close()
        self._reader.join()
        self._guardian.wait()

    def _read_events(self) -> None:
        assert self._guardian.stdout is not None
        with self._guardian.stdout as events:
            for line in events:
                event = json.loads(line)
                self.process_ids |= event.get("started", {})
                if "dead" in event:
                    self.dead_process, self.reason = event["dead"], event["reason"]
                    self.ended.set()
        if not self._stopping and self.reason is None:
            self.reason = "the supervisor ended without a message"
        self.ended.set()


def main() -> None:
    """Run the guardian, which forks the supervisor."""
    line = sys.stdin.buffer.readline()
    if not line:
        return
    fields = json.loads(line)
    plan = Plan(**fields | {"processes": [ProcessSpec(**part) for part in fields["processes"]]})
    lifeline, guardian_end = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(guardian_end)
        run_supervisor(plan, lifeline)
    else:
        os.close(lifeline)
        run_guardian(plan, supervisor, guardian_end)
    for path in plan.remove:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            Path(path).unlink()


def run_guardian(plan: Plan, supervisor: int, lifeline: int) -> None:
    """Forward a stop request to the supervisor.

    If the supervisor was killed, end its descendants.
    """
    descendants = Descendants()
    is_stopping = False
    while not is_stopping and supervisor not in descendants.ended:
        is_stopping = descendants.wait(lifeline=sys.stdin.fileno())
    os.close(lifeline)
    if status := descendants.ended.get(supervisor, 0):
        report(dead="supervisor", reason=f"the supervisor {describe_status(status)}")
    descendants.wait_for_end(
        supervisor, sum(part.stop_seconds for part in plan.processes) + 2 * GRACE_SECONDS
    )
    end_all(descendants)


def run_supervisor(plan: Plan, lifeline: int) -> None:
    """Start the processes, and stop all in reverse order when one ends.

    Closing the lifeline stops them too.
    """
    descendants = Descendants()
    running: list[tuple[subprocess.Popen[bytes], ProcessSpec]] = []
    is_stopping = False
    for part in plan.processes:
        try:
            running.append((start(part, plan.directory), part))
        except OSError as error:
            report(dead=part.name, reason=f"{part.name} could not be started: {error}")
            is_stopping = True
            break
    report(started={part.name: process.pid for process, part in running})
    vital: dict[psutil.Process, VitalChild] = {}
    while not is_stopping:
        ends = [child.end for child in vital.values()]
        is_stopping = descendants.wait(lifeline=lifeline, ends=ends, timeout_seconds=VITAL_SECONDS)
        lost = dead_child(vital)
        if lost:  # the kernel may end it with its parent, before the end of the parent can be seen
            descendants.wait_for_end(lost.parent, 0.1)
        dead = [
            (part, descendants.ended[process.pid])
            for process, part in running
            if process.pid in descendants.ended
        ]
        if dead and not is_stopping:
            part, status = dead[0]
            report(dead=part.name, reason=f"{part.name} {describe_status(status)}")
            is_stopping = True
        elif lost and not is_stopping:
            report(dead=lost.part, reason=f"{lost.part} lost its {lost.name}")
            is_stopping = True
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
    """Start a process.

    `Descendants` collects its status, and the `Popen` must stay referenced.
    """
    with Path(part.log).open("wb") as log:
        return subprocess.Popen(
            part.command,
            env=part.environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,  # only the owner reads databases, logs and models
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
