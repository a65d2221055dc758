"""Watchdog for collectives on a device stream, which the host does not wait for.

Reading a stamp on the device would make the host wait. The sum of stamps is therefore copied to pinned memory on the stream, and a
thread checks the copies that have arrived and the calls that are late. An error is raised at the next call of any layer. If a
call is late, the thread also aborts the process group, since the host may already be waiting for the device, which waits for a
missing rank.

This module has not run on a machine with several GPUs.
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
    """A collective that is queued on a device stream."""

    call: CollectiveId
    arrived: torch.cuda.Event
    stamps: Tensor
    expected: list[float]
    deadline: float
    desync: Callable[[CollectiveId, str], DesyncError]
    abort: Callable[[], None]


class CollectiveWatchdog:
    """Observes pending collectives in queue order, and raises DesyncError for late or mispaired ones."""

    def __init__(self) -> None:
        self._pending: deque[Pending] = deque()
        self._failure: DesyncError | None = None
        self._thread: threading.Thread | None = None
        self._unanswered: Pending | None = None
        """Collective whose event could not be queried; logged once."""

    def raise_failure(self) -> None:
        """Raise the error found since the last call, if any."""
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
        """Observe a collective whose summed stamps will be in a device tensor."""
        copy = torch.empty(stamps.shape, dtype=stamps.dtype, device="cpu", pin_memory=True).copy_(
            stamps, non_blocking=True
        )
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(stamps.device))
        deadline = time.monotonic() + call.site.timeout_seconds
        self.follow(Pending(call, arrived, copy, expected, deadline, desync, abort))

    def follow(self, pending: Pending) -> None:
        """Add a pending collective, and start the thread on first use."""
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
                except Exception:  # later collectives must still be checked
                    _log.exception("%s cannot be checked", self._pending[0].call)
                    is_over = True
                if not is_over:
                    break
                self._pending.popleft()

    def _look(self, pending: Pending) -> bool:
        """Check a collective; return whether it is finished, successfully or not."""
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
            # A device or driver error may be transient; if it is not, the timeout applies.
            if self._unanswered is not pending:
                _log.exception("%s: its completion could not be queried", pending.call)
            self._unanswered = pending
            return False

    def _fail(self, failure: DesyncError) -> None:
        _log.error("%s", failure)
        self._failure = self._failure or failure


watch = CollectiveWatchdog()
