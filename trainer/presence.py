"""The one driver of an attempt: its claim, its signs of life, and its ear for the word that the attempt is over.

Ray may start a driver late, start it again after its head was lost, or call a living one dead. So an attempt belongs to the driver
that first made its file; the service sees by that file's time whether the driver lives; and once the service has closed the
attempt, the driver ends itself.
"""

import os
import signal
import threading
import time
from pathlib import Path

from trainer.spec import CLOSED_FILE, DRIVER_FILE, attempt_folder

SECONDS_BETWEEN_SIGNS = 1.0
SECONDS_UNTIL_DEAD = 10.0
"""Without a sign from the driver of the attempt before this one."""
SECONDS_TO_END = 20.0
"""Between the word that the attempt is over, which interrupts the driver, and its end by force."""
ENDED = b"ended\n"
"""Content of the file of a driver that has ended by itself."""


class Presence:
    """Of the driver of one attempt, in the attempt's folder."""

    def __init__(self, job_folder: Path, attempt: int) -> None:
        self._folder = attempt_folder(job_folder, attempt)
        self._file = self._folder / DRIVER_FILE
        self._before = attempt_folder(job_folder, attempt - 1) / DRIVER_FILE
        self._is_over = threading.Event()

    def claim(self) -> str | None:
        """Take the attempt for this process; otherwise say why it cannot be had. Waits until no driver before it is alive."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wait_for_the_one_before()
        if (self._folder / CLOSED_FILE).exists():
            return "the service has ended this attempt"
        try:
            self._file.touch(exist_ok=False)
        except FileExistsError:
            return "this attempt has had its driver"
        threading.Thread(target=self._live, name="presence", daemon=True).start()
        return None

    def end(self) -> None:
        """Tell that this driver has ended."""
        self._is_over.set()
        self._file.write_bytes(ENDED)

    def _live(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SIGNS):
            os.utime(self._file)
            if (self._folder / CLOSED_FILE).exists():
                print("the service has ended this attempt; stopping", flush=True)
                os.kill(os.getpid(), signal.SIGINT)
                if not self._is_over.wait(SECONDS_TO_END):
                    os._exit(3)
                return

    def _wait_for_the_one_before(self) -> None:
        """Wait until the driver of the attempt before has ended, or given no sign for so long. Only this machine's clock counts."""
        seen, since = self._sign_before(), time.monotonic()
        while seen is not None and time.monotonic() - since < SECONDS_UNTIL_DEAD:
            time.sleep(SECONDS_BETWEEN_SIGNS / 4)
            if (sign := self._sign_before()) != seen:
                seen, since = sign, time.monotonic()

    def _sign_before(self) -> float | None:
        try:
            return None if self._before.read_bytes() == ENDED else self._before.stat().st_mtime
        except FileNotFoundError:
            return None
