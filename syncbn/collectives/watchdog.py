"""Time limit and desync check for collectives that the host does not wait for: those on a device's own stream.

The host only queues work for the device and runs on; to look at a stamp or at a clock there would make it wait. So the
sum of stamps is copied to the host on the stream, and a thread looks at the copies that have arrived and at the calls that
are late. What it finds is raised at the next call of any layer. If a call is late, the thread also aborts the process
group, since by then the host may be waiting for the device, which waits for a rank that does not come.

None of this has been run on a machine with several GPUs yet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from syncbn.collectives.context import CollectiveId
from syncbn.errors import DesyncError

INTERVAL_SECONDS = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pending:
    """A collective that the device has been told to do."""

    call: CollectiveId
    arrived: torch.cuda.Event
    stamps: Tensor
    expected: list[float]
    deadline: float
    desync: Callable[[CollectiveId, str], DesyncError]
    abort: Callable[[], None]


class CollectiveWatchdog:
    """Looks after pending collectives, in the order in which they were queued."""

    def __init__(self) -> None:
        self._pending: deque[Pending] = deque()
        self._failure: DesyncError | None = None
        self._thread: threading.Thread | None = None
        self._unanswered: Pending | None = None
        """The collective whose event could not be queried, which is logged once."""

    def raise_failure(self) -> None:
        """Raise what was found since the last call, if anything."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def add(
        self,
        call: CollectiveId,
        stamps: Tensor,
        expected: list[float],
        desync: Callable[[CollectiveId, str], DesyncError],
        abort: Callable[[], None],
    ) -> None:
        """Look after a collective whose summed stamps are in a tensor on a device, once the stream has come that far."""
        copy = torch.empty(stamps.shape, dtype=stamps.dtype, device="cpu", pin_memory=True).copy_(
            stamps, non_blocking=True
        )
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(stamps.device))
        deadline = time.monotonic() + call.site.timeout_seconds
        self.follow(Pending(call, arrived, copy, expected, deadline, desync, abort))

    def follow(self, pending: Pending) -> None:
        """Have the thread look after a collective."""
        self._pending.append(pending)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="syncbn watch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_SECONDS)
            while self._pending:
                try:
                    is_over = self._look(self._pending[0])
                except Exception:  # the collectives after it must still be checked
                    _log.exception("%s cannot be checked", self._pending[0].call)
                    is_over = True
                if not is_over:
                    break
                self._pending.popleft()

    def _look(self, pending: Pending) -> bool:
        """Return whether there is nothing more to be learned about a collective."""
        if self._has_arrived(pending):
            if pending.stamps.tolist() != pending.expected:
                self._fail(pending.desync(pending.call, "paired with another call"))
            return True
        if time.monotonic() < pending.deadline:
            return False
        self._fail(pending.desync(pending.call, f"not complete after {pending.call.site.timeout_seconds:.1f} s"))
        pending.abort()
        return True

    def _has_arrived(self, pending: Pending) -> bool:
        try:
            return bool(pending.arrived.query())  # type: ignore[no-untyped-call]
        except Exception:
            # An error of the device or the driver may pass; if it does not, the time limit applies.
            if self._unanswered is not pending:
                _log.exception("%s: its completion could not be queried", pending.call)
            self._unanswered = pending
            return False

    def _fail(self, failure: DesyncError) -> None:
        _log.error("%s", failure)
        self._failure = self._failure or failure


watch = CollectiveWatchdog()
