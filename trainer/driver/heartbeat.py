"""Attempt lock and driver heartbeat.

Ray may start a driver late, restart it after the head node was lost, or report a running driver as dead. An
attempt therefore belongs to the driver that created its lock file; the modification time of this file is the
driver's heartbeat for the service; and a driver whose attempt the service has closed ends itself.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from trainer.jobspec import CLOSED_FILE, DRIVER_FILE, NOT_STARTED, STORAGE_FAILED, attempt_folder

HEARTBEAT_INTERVAL_SECONDS = 1.0
ORPHANS_SECONDS = 10.0
"""Time after the end of a driver for Ray to end its workers."""
END_TIMEOUT_SECONDS = 20.0
"""Time from the interrupt of a driver, because its attempt was closed, until it is killed."""
MAX_HEARTBEAT_AGE_SECONDS = 40.0
"""Time without a successful heartbeat after which a driver ends itself.

It is less than the default of the service's SYNCBN_HEARTBEAT_TIMEOUT_SECONDS, 60.
"""
HEARTBEAT_TIMEOUT_SECONDS = MAX_HEARTBEAT_AGE_SECONDS + 5.0 + ORPHANS_SECONDS
"""Time without a heartbeat after which the driver of an earlier attempt has ended itself.

It may run on another machine; its workers have ended with it.
"""
ENDED = b"ended\n"
"""Content of the lock file of a driver that has ended by itself."""


class DriverState(NamedTuple):
    """State of a driver that has not recorded its end."""

    heartbeat: float
    is_dead: bool
    """Whether it ran on this machine and is gone."""


class AttemptLock:
    """Lock of one attempt, held by its driver, and the driver's heartbeat."""

    def __init__(self, job_folder: Path, attempt: int) -> None:
        self._folder = attempt_folder(job_folder, attempt)
        self._file = self._folder / DRIVER_FILE
        self._previous = [
            attempt_folder(job_folder, number) / DRIVER_FILE for number in range(attempt - 1, 0, -1)
        ]
        self._is_over = threading.Event()
        self._last_beat = time.monotonic()

    def acquire(self) -> str | None:
        """Acquire the lock, after waiting for the drivers of earlier attempts.

        Returns None, or the reason why this process cannot have the lock.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_previous_drivers()
        if (self._folder / CLOSED_FILE).exists():
            return "the service has closed this attempt"
        try:
            with self._file.open("xb") as file:
                file.write(_identity())
        except FileExistsError:
            return "this attempt already has a driver"
        self._last_beat = time.monotonic()
        for work in (self._live, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()
        return None

    def end(self) -> None:
        """Record that this driver has ended."""
        self._is_over.set()
        with suppress(OSError):  # without this record, the next attempt waits for the timeout
            self._file.write_bytes(ENDED)

    def _live(self) -> None:
        while not self._is_over.wait(HEARTBEAT_INTERVAL_SECONDS):
            self._beat()
            if self._is_closed():
                with suppress(OSError):
                    print("the service has closed this attempt; stopping", flush=True)
                os.kill(os.getpid(), signal.SIGINT)
                deadline = time.monotonic() + END_TIMEOUT_SECONDS
                while not self._is_over.wait(HEARTBEAT_INTERVAL_SECONDS):
                    self._beat()  # still alive: the next attempt waits for the end of this one
                    if time.monotonic() > deadline:
                        os._exit(NOT_STARTED)
                return

    def _beat(self) -> None:
        with suppress(OSError):  # storage errors may be transient; `_watch` limits them
            os.utime(self._file)
            self._last_beat = time.monotonic()

    def _is_closed(self) -> bool:
        try:
            return (self._folder / CLOSED_FILE).exists()
        except OSError:
            return False

    def _watch(self) -> None:
        """End the driver if its heartbeats fail, for example because the storage hangs."""
        while not self._is_over.wait(HEARTBEAT_INTERVAL_SECONDS):
            if time.monotonic() - self._last_beat > MAX_HEARTBEAT_AGE_SECONDS:
                os._exit(STORAGE_FAILED)

    def _wait_for_previous_drivers(self) -> None:
        """Wait until the drivers of earlier attempts have ended or timed out.

        Only this machine's clock is used.
        """
        seen, since = self._previous_states(), time.monotonic()
        while running := [state for state in seen if state is not None]:
            limit = ORPHANS_SECONDS if all(state.is_dead for state in running) else HEARTBEAT_TIMEOUT_SECONDS
            if time.monotonic() - since >= limit:
                return
            time.sleep(HEARTBEAT_INTERVAL_SECONDS / 4)
            if (states := self._previous_states()) != seen:
                seen, since = states, time.monotonic()

    def _previous_states(self) -> list[DriverState | None]:
        return [_state_of(driver) for driver in self._previous]


def _state_of(driver: Path) -> DriverState | None:
    """Return the state of a driver, or None if it has ended by itself or never ran."""
    try:
        content, heartbeat = driver.read_bytes(), driver.stat().st_mtime
    except FileNotFoundError:
        return None
    return None if content == ENDED else DriverState(heartbeat, _is_dead(content))


def _identity() -> bytes:
    """Return a text that identifies this process among those of all machines."""
    process = psutil.Process()
    return f"{_machine()} {process.pid} {process.create_time()}\n".encode()


def _is_dead(identity: bytes) -> bool:
    """Return whether a process has ended; False for those of other machines."""
    machine, _, rest = identity.decode(errors="replace").partition(" ")
    pid, _, started = rest.strip().partition(" ")
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        process = psutil.Process(int(pid))
        return str(process.create_time()) != started or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """Return an identifier of this boot of the machine and this process namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{Path('/proc/self/ns/pid').readlink().name}"
