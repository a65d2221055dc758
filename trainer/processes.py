"""Process trees: subreaper, end of all descendants, exit statuses.

Shared with the service.
"""

import ctypes
import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OUTSIDE_SIGNALS = (*STOP_SIGNALS, signal.SIGKILL, signal.SIGPWR)
"""Signals sent by others: Ray, an operator, a node that shuts down."""
GRACE_SECONDS = 1.0
"""Time from SIGTERM to SIGKILL for descendants."""
GIVE_UP_SECONDS = 5.0
"""Time after which a process that survives SIGKILL counts as stuck in the operating system."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Descendants:
    """Descendants of this process, orphans included.

    `ended` has the status of each direct child that has ended, as in `subprocess`: negative for a signal.
    """

    def __init__(self) -> None:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.ended: dict[int, int] = {}
        self._signals, writable = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(writable, False)
        for number in (signal.SIGCHLD, *STOP_SIGNALS):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        self._reap()

    def wait(
        self, *, lifeline: int | None = None, ends: Iterable[int] = (), timeout_seconds: float | None = None
    ) -> bool:
        """Wait for the end of a child, or of a process in `ends` (pidfds).

        Returns True if a stop signal arrived or the lifeline closed.
        """
        watched = [self._signals, *ends] if lifeline is None else [self._signals, lifeline, *ends]
        readable, _, _ = select.select(watched, [], [], timeout_seconds)
        is_asked = lifeline in readable  # nothing is ever written to it
        if self._signals in readable:
            is_asked |= not set(STOP_SIGNALS).isdisjoint(os.read(self._signals, 4096))
        self._reap()
        return is_asked

    def stop(self, pid: int, seconds: float) -> None:
        """Send SIGTERM to one child, and wait for its end, at most `seconds`."""
        if pid not in self.ended:
            os.kill(pid, signal.SIGTERM)
            self.wait_for_end(pid, seconds)

    def wait_for_end(self, pid: int, seconds: float) -> None:
        """Wait for the end of one child, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while pid not in self.ended and (left := deadline - time.monotonic()) > 0:
            self.wait(timeout_seconds=left)

    def end(self) -> list[int]:
        """End every descendant: SIGTERM once, then SIGKILL, until none is left.

        Returns the process ids that survive.
        """
        begin = time.monotonic()
        asked: set[psutil.Process] = set()
        while left := psutil.Process().children(recursive=True):
            elapsed = time.monotonic() - begin
            if elapsed > GIVE_UP_SECONDS:
                return [process.pid for process in left]
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    if elapsed > GRACE_SECONDS:
                        process.kill()
                    elif process not in asked:
                        process.terminate()
            asked.update(left)
            self.wait(timeout_seconds=0.1)
        return []

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.ended[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def die_with_parent() -> None:
    """Let the kernel send SIGKILL to this process when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def describe_status(status: int) -> str:
    """Return how a process with this status ended, as text."""
    return (
        f"was killed by signal {-status} ({signal.strsignal(-status)})"
        if status < 0
        else f"ended with status {status}"
    )


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
