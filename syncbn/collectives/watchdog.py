"""Watchdog for collectives on a device stream, which the host does not wait for.

Reading a stamp on the device would make the host wait. The operation that unpacks a summed vector therefore
compares the stamp on the device, and writes two numbers per process and device: the first mispaired call and
the newest complete call. A thread reads them now and then, whatever the number of calls, and knows the layer,
phase and number of each. An error is raised at the next call of any layer. If a call is late, the thread also
aborts the process group, since the host may already be waiting for the device, which waits for a missing
rank.

This module has not run on a machine with several GPUs.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from syncbn.collectives.context import CollectiveId
from syncbn.errors import DesyncError
from syncbn.kernels.statistics import NEVER, Check

INTERVAL_SECONDS = 0.2
_log = logging.getLogger(__name__)

MakeError = Callable[[CollectiveId, str], DesyncError]


@dataclass(frozen=True)
class Pending:
    """A collective that is queued on a device stream."""

    number: int
    call: CollectiveId
    deadline: float
    desync: MakeError


@dataclass
class DeviceProgress:
    """Progress of the collectives of one device."""

    device: torch.device
    pending: deque[Pending] = field(default_factory=deque)
    """Calls in the order of their numbers, up to the newest one that was complete when it was read before."""
    is_unreadable: bool = False

    def __post_init__(self) -> None:
        # The first use may be in inference mode, and later ones not.
        with torch.inference_mode(False):
            self.numbers = torch.tensor([NEVER, 0], device=self.device)
        self._complete = 0
        self._reported = 0
        self._newest = 0

    @property
    def is_idle(self) -> bool:
        """Whether every call that was queued is complete, and has been checked."""
        return not self.pending and self._complete >= self._newest

    def add(self, pending: Pending) -> None:
        """Add a call that is about to be queued."""
        self._newest = pending.number
        self.pending.append(pending)

    def read(self) -> tuple[int, int]:
        """Return the numbers of the first mispaired and the newest complete call.

        Raises:
            TimeoutError: the device does not answer.
        """
        if self.device.type == "cpu":
            first, newest = self.numbers.tolist()
            return first, newest
        # On a separate stream, since that of the collectives may wait for a missing rank.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            copy = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=True)
            copy.copy_(self.numbers, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        for _ in range(100):
            if arrived.query():  # type: ignore[no-untyped-call]
                first, newest = copy.tolist()
                return first, newest
            time.sleep(INTERVAL_SECONDS / 100)
        raise TimeoutError(f"{self.device} did not answer")

    @property
    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self, "_own_stream"):
            self._own_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._own_stream

    def check(self) -> tuple[Pending, str] | None:
        """Return a mispaired or late call with its fault, or None."""
        first, newest = self._read_or_log()
        pending = tuple(self.pending)  # calls are added meanwhile
        if first < NEVER:
            self._reset()
            # A reset takes effect behind what is queued. The calls that were complete at the last reading are
            # still known, see below.
            call = next((each for each in pending if each.number == first), None)
            if call is not None and first != self._reported:
                self._reported = first
                return call, "paired with another call"
        while self.pending and self.pending[0].number <= self._complete:
            self.pending.popleft()
        # The flag may have been read before the number of complete calls was written: these stay once more.
        self._complete = max(self._complete, newest)
        late = next((each for each in pending if each.number > self._complete), None)
        if late is not None and time.monotonic() >= late.deadline:
            self.pending.clear()
            return late, f"not complete after {late.call.site.timeout_seconds:.1f} s"
        return None

    def _reset(self) -> None:
        with torch.cuda.stream(self._stream if self.device.type == "cuda" else None):
            self.numbers[0] = NEVER

    def _read_or_log(self) -> tuple[int, int]:
        try:
            numbers = self.read()
        except Exception:
            # An error of the device or driver may be transient; if it is not, the timeout applies.
            if not self.is_unreadable:
                _log.exception("the progress of collectives on %s could not be read", self.device)
            self.is_unreadable = True
            return NEVER, self._complete
        self.is_unreadable = False
        return numbers


class CollectiveWatchdog:
    """Watchdog of the collectives that are queued on the devices of this process.

    Raises DesyncError for late and for mispaired ones.
    """

    def __init__(self) -> None:
        self._devices: dict[torch.device, DeviceProgress] = {}
        self._numbers = itertools.count(1)
        self._failure: DesyncError | None = None
        self._thread: threading.Thread | None = None

    def raise_failure(self) -> None:
        """Raise the error found since the last call, if any."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def follow(self, call: CollectiveId, device: torch.device, expected: int, desync: MakeError) -> Check:
        """Observe a collective before it is queued; return what to compare its stamp with.

        The operations that unpack its vector must note it as complete. The thread starts on first use.
        """
        if device not in self._devices:
            self._devices[device] = DeviceProgress(device)
        progress, number = self._devices[device], next(self._numbers)
        progress.add(Pending(number, call, time.monotonic() + call.site.timeout_seconds, desync))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="syncbn watch", daemon=True)
            self._thread.start()
        return Check(progress.numbers, expected, number)

    def forget(self, check: Check, device: torch.device) -> None:
        """No longer observe a collective that could not be queued."""
        pending = self._devices[device].pending
        for each in tuple(pending):
            if each.number == check.call:
                pending.remove(each)

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_SECONDS)
            for progress in list(self._devices.values()):
                if progress.is_idle:
                    continue
                try:
                    fault = progress.check()
                    if fault is not None:
                        self._fail(*fault)
                except Exception:  # later collectives must still be checked
                    _log.exception("the collectives on %s cannot be checked", progress.device)

    def _fail(self, pending: Pending, how: str) -> None:
        failure = pending.desync(pending.call, how)
        _log.error("%s", failure)
        self._failure = self._failure or failure
        if how.startswith("not complete"):
            abort(pending.call)


def abort(call: CollectiveId) -> None:
    """Abort the process group of a call, so that nothing waits for a missing rank."""
    try:
        call.group.abort()
    except Exception:  # such as a version of torch without this method
        _log.exception("%s: its process group cannot be aborted; end this process", call)


watch = CollectiveWatchdog()
