"""Attempt lock and driver heartbeat.

Ray may start a driver late, start it again after its head was lost, or call a living one dead. So an attempt belongs to the driver
that first made its file; the service sees by that file's time whether the driver lives; and once the service has closed the
attempt, the driver ends itself.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from trainer.jobspec import CLOSED_FILE, DRIVER_FILE, attempt_folder

SECONDS_BETWEEN_SIGNS = 1.0
HEARTBEAT_TIMEOUT_SECONDS = 10.0
"""Without a sign, the driver of an attempt before this one."""
SECONDS_TO_END = 20.0
"""Between the word that the attempt is over, which interrupts the driver, and its end by force."""
SECONDS_WITHOUT_SIGN = 40.0
"""After which a driver that cannot give one ends itself: less than the service waits, which is 60 by default."""
ENDED = b"ended\n"
"""Content of the file of a driver that has ended by itself."""


class AttemptLock:
    """Of the driver of one attempt, in the attempt's folder."""

    def __init__(self, job_folder: Path, attempt: int) -> None:
        self._folder = attempt_folder(job_folder, attempt)
        self._file = self._folder / DRIVER_FILE
        self._before = [attempt_folder(job_folder, number) / DRIVER_FILE for number in range(attempt - 1, 0, -1)]
        self._is_over = threading.Event()
        self._signed_at = time.monotonic()

    def claim(self) -> str | None:
        """Take the attempt for this process; otherwise say why it cannot be had. Waits until no driver before it is alive."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_those_before()
        if (self._folder / CLOSED_FILE).exists():
            return "the service has ended this attempt"
        try:
            self._file.touch(exist_ok=False)
        except FileExistsError:
            return "this attempt has had its driver"
        self._signed_at = time.monotonic()
        for work in (self._live, self._watch):
            threading.Thread(target=work, name="presence", daemon=True).start()
        return None

    def end(self) -> None:
        """Record that this driver has ended."""
        self._is_over.set()
        with suppress(OSError):  # without it others wait a little longer
            self._file.write_bytes(ENDED)

    def _live(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SIGNS):
            self._sign()
            if self._is_closed():
                with suppress(OSError):
                    print("the service has ended this attempt; stopping", flush=True)
                os.kill(os.getpid(), signal.SIGINT)
                deadline = time.monotonic() + SECONDS_TO_END
                while not self._is_over.wait(SECONDS_BETWEEN_SIGNS):
                    self._sign()  # the next attempt waits for the end of this one
                    if time.monotonic() > deadline:
                        os._exit(3)
                return

    def _sign(self) -> None:
        with suppress(OSError):  # of a storage that may be back in a moment
            os.utime(self._file)
            self._signed_at = time.monotonic()

    def _is_closed(self) -> bool:
        try:
            return (self._folder / CLOSED_FILE).exists()
        except OSError:
            return False

    def _watch(self) -> None:
        """End a driver that cannot show that it lives, also because the storage hangs, before the service takes it for dead."""
        while not self._is_over.wait(SECONDS_BETWEEN_SIGNS):
            if time.monotonic() - self._signed_at > SECONDS_WITHOUT_SIGN:
                os._exit(3)

    def _wait_for_those_before(self) -> None:
        """Wait until the drivers of all attempts before have ended, or given no sign for so long, by this machine's clock alone."""
        seen, since = self._signs_before(), time.monotonic()
        while any(sign is not None for sign in seen) and time.monotonic() - since < HEARTBEAT_TIMEOUT_SECONDS:
            time.sleep(SECONDS_BETWEEN_SIGNS / 4)
            if (signs := self._signs_before()) != seen:
                seen, since = signs, time.monotonic()

    def _signs_before(self) -> list[float | None]:
        return [_sign_of(driver) for driver in self._before]


def _sign_of(driver: Path) -> float | None:
    """When a driver last showed that it lives; None if there was none, or it has ended."""
    try:
        return None if driver.read_bytes() == ENDED else driver.stat().st_mtime
    except FileNotFoundError:
        return None
