"""Log files of driver and workers, and the index of their order."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.jobspec import LOG_FILE, LOG_INDEX_FILE

INDEX_SECONDS = 0.25
"""Interval between index updates; output of several files within it is in the order of their names."""
MAX_LINE_BYTES = 65_536
"""Length from which an incomplete line is indexed."""


def redirect_output(path: Path) -> None:
    """Redirect output of this process and its children, native code included."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


@contextmanager
def indexed_logs(folder: Path) -> Iterator[None]:
    """Update the index of a folder's log files in a thread."""
    is_over = threading.Event()
    index = LogIndex(folder)

    def work() -> None:
        while not is_over.wait(INDEX_SECONDS):
            index.update()
        index.update()

    thread = threading.Thread(target=work, name="log index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(10)


class LogIndex:
    """Index of a folder's log files.

    What it does not contain comes after it, in the order of file names.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        (folder / LOG_INDEX_FILE).touch()

    def update(self) -> None:
        """Append the complete lines that were added since the last update."""
        lines = []
        with suppress(OSError):  # storage errors may be transient
            for path in sorted(
                self._folder.glob("log*.txt"), key=lambda path: (path.name != LOG_FILE, path.name)
            ):
                size, before = path.stat().st_size, self._ends.get(path.name, 0)
                if size == self._sizes.get(path.name, 0):
                    continue
                self._sizes[path.name] = size
                if (end := _end_of_lines(path, before, size)) > before:
                    lines.append(f"{path.name} {end}\n")
                    self._ends[path.name] = end
        if lines:
            with suppress(OSError), (self._folder / LOG_INDEX_FILE).open("a") as index:
                index.write("".join(lines))


def _end_of_lines(path: Path, start: int, size: int) -> int:
    """Return the end of the last complete line in a file's first `size` bytes.

    Returns `start` if there is none after it.
    """
    with path.open("rb") as file:
        begin = max(start, size - MAX_LINE_BYTES)
        file.seek(begin)
        newline = file.read(size - begin).rfind(b"\n")
    if newline >= 0:
        return begin + newline + 1
    return size if size - start > MAX_LINE_BYTES else start
