"""Disk cache of facts about data, shared by the processes of a machine."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

CACHE_VERSION = "datasets-2"
"""Changes when what is cached does."""


def cached(name: str, write: Callable[[BinaryIO], None]) -> Path:
    """Return the file `name` of the cache, which `write` writes where it is missing: one process does, the others wait."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncbn" / CACHE_VERSION
    path, part = folder / name, folder / f"{name}.part"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # The lock goes with its process, however that ends. The file is renamed into place, so none is ever seen half written.
    with part.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with part.open("wb") as file:
                write(file)
            part.rename(path)
    return path
