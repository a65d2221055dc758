"""Keeps a set of programs running together: when one of them ends, or whoever asked for them does, all of them end.

    asker --pipe--> guard --pipe--> keeper --> the parts, each in a session of its own, writing to a log of its own

`Kept` is the asker's end. Guard and keeper are `python -m service.cli.keeper`: the plan is one line of JSON on standard input,
which then stays open, and whose end means stop; standard output carries events, and its end means that no process is left.
Each of the two adopts what its descendants leave behind (a Linux "child subreaper"), so a daemon that left its session and
its parent is still found, and either of them can be killed without anything surviving it.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 1.0  # between SIGTERM and SIGKILL for what the parts left behind
GIVE_UP_SECONDS = 5.0  # a process that outlives SIGKILL this long hangs inside the operating system
VITAL_SECONDS = 1.0  # between two looks at the vital children
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Part:
    """One program to keep running.

    `stop_seconds` is what it gets between SIGTERM and SIGKILL; the end of a child that runs one of the programs `vital_children`
    counts as its own, for it may take long to notice, or never do.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: str
    stop_seconds: float = 3
    vital_children: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to keep: parts in their order of start (stopped in reverse), and the paths to remove when all have ended."""

    parts: Sequence[Part]
    directory: str
    remove: Sequence[str] = ()


class Kept:
    """The asker's end of a keeper: `ended` is set once a part has died (`reason` says how) or everything has stopped."""

    def __init__(self, plan: Plan, *, log: Path, pass_fds: Sequence[int] = ()) -> None:
        self.ended = threading.Event()
        self.process_ids: dict[str, int] = {}
        self.dead_part: str | None = None
        self.reason: str | None = None
        self._stopping = False
        with log.open("wb") as errors:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "service.cli.keeper"],
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
        """Tell the keeper to stop, and return when no process is left."""
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
    """Be the guard, and fork the keeper."""
    line = sys.stdin.buffer.readline()
    if not line:
        return
    fields = json.loads(line)
    plan = Plan(**fields | {"parts": [Part(**part) for part in fields["parts"]]})
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
    """Pass the wish to stop on to the keeper, and end what it left if it was killed."""
    descendants = Descendants()
    told = False
    while not told and keeper not in descendants.ended:
        told = descendants.wait(lifeline=sys.stdin.fileno())
    os.close(lifeline)
    if status := descendants.ended.get(keeper, 0):
        report(dead="keeper", reason=f"the keeper of the processes {describe(status)}")
    descendants.wait_for_end(keeper, sum(part.stop_seconds for part in plan.parts) + 2 * GRACE_SECONDS)
    descendants.end()


def keep(plan: Plan, lifeline: int) -> None:
    """Start the parts, wait until one dies or the lifeline closes, then stop them all, the last started first."""
    descendants = Descendants()
    running: list[tuple[subprocess.Popen[bytes], Part]] = []
    told = False
    for part in plan.parts:
        try:
            running.append((start(part, plan.directory), part))
        except OSError as error:
            report(dead=part.name, reason=f"{part.name} could not be started: {error}")
            told = True
            break
    report(started={part.name: process.pid for process, part in running})
    vital: dict[psutil.Process, tuple[Part, str]] = {}
    while not told:
        told = descendants.wait(lifeline=lifeline, timeout_seconds=VITAL_SECONDS)
        dead = [(part, descendants.ended[process.pid]) for process, part in running if process.pid in descendants.ended]
        if dead and not told:
            part, status = dead[0]
            report(dead=part.name, reason=f"{part.name} {describe(status)}")
            told = True
        elif not told and (lost := lost_child(running, vital)):
            report(dead=lost[0].name, reason=f"{lost[0].name} lost its {lost[1]}")
            told = True
    for process, part in reversed(running):
        descendants.stop(process.pid, part.stop_seconds)
    descendants.end()


def lost_child(
    running: Sequence[tuple[subprocess.Popen[bytes], Part]], vital: dict[psutil.Process, tuple[Part, str]]
) -> tuple[Part, str] | None:
    """Note the vital children that have come to life, and tell of one that has ended."""
    for process, part in running:
        if part.vital_children:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children():
                    if (name := child.name()) in part.vital_children:
                        vital.setdefault(child, (part, name))
    for child, lost in vital.items():
        with suppress(psutil.NoSuchProcess):
            if child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                continue
        return lost
    return None


def start(part: Part, directory: str) -> subprocess.Popen[bytes]:
    """Start one part. `Descendants` collects its end, not the `Popen`, which must stay referenced for as long."""
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


class Descendants:
    """Everything below this process, orphans included; `ended` has the status of each direct child that has ended.

    A status is counted as `subprocess` does: negative for a signal.
    """

    def __init__(self) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
        self.ended: dict[int, int] = {}
        self._signals, writable = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(writable, False)
        for number in (signal.SIGCHLD, *STOP_SIGNALS):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        self._reap()

    def wait(self, *, lifeline: int | None = None, timeout_seconds: float | None = None) -> bool:
        """Wait for a child's end; True if a stop signal came or the lifeline closed."""
        watched = [self._signals] if lifeline is None else [self._signals, lifeline]
        readable, _, _ = select.select(watched, [], [], timeout_seconds)
        told = lifeline in readable  # nothing is ever written to it
        if self._signals in readable:
            told |= not set(STOP_SIGNALS).isdisjoint(os.read(self._signals, 4096))
        self._reap()
        return told

    def stop(self, pid: int, seconds: float) -> None:
        """Ask one child to end, and wait for it no longer than `seconds`."""
        if pid not in self.ended:
            os.kill(pid, signal.SIGTERM)
            self.wait_for_end(pid, seconds)

    def wait_for_end(self, pid: int, seconds: float) -> None:
        """Wait for the end of one child, no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while pid not in self.ended and (left := deadline - time.monotonic()) > 0:
            self.wait(timeout_seconds=left)

    def end(self) -> None:
        """End every descendant: SIGTERM once, then SIGKILL, looking again until none is left."""
        begin = time.monotonic()
        asked: set[psutil.Process] = set()
        while left := psutil.Process().children(recursive=True):
            elapsed = time.monotonic() - begin
            if elapsed > GIVE_UP_SECONDS:
                report(left=[process.pid for process in left])
                return
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    if elapsed > GRACE_SECONDS:
                        process.kill()
                    elif process not in asked:
                        process.terminate()
            asked.update(left)
            self.wait(timeout_seconds=0.1)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.ended[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def describe(status: int) -> str:
    """Say how a process with this status ended."""
    return (
        f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"ended with status {status}"
    )


def report(**event: Any) -> None:
    """Write one event; nobody may be left to read it."""
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    main()
