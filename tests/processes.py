"""Searching processes and waiting for their end."""

import os
import select
import time
from collections.abc import Iterable
from pathlib import Path

import psutil


def still_alive(processes: Iterable[psutil.Process], limit_seconds: float) -> list[psutil.Process]:
    """Return the processes that still live after the limit; a zombie counts as ended."""
    deadline = time.monotonic() + limit_seconds
    alive = []
    for process in processes:
        try:
            ending = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([ending], [], [], max(0, deadline - time.monotonic()))
            if not ended and process.is_running():
                alive.append(process)
        finally:
            os.close(ending)
    return alive


def working_in(directory: Path) -> list[psutil.Process]:
    """Return every process whose working folder this is, regardless of its parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_file(path: Path, limit_seconds: float = 30) -> None:
    """Wait until a process has created this file."""
    deadline = time.monotonic() + limit_seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
