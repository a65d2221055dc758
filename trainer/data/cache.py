"""Disk cache of derived data, and fingerprints of datasets."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

CACHE_VERSION = "datasets-2"
"""Version of the cache, incremented when its content changes."""


def cached(name: str, write: Callable[[BinaryIO], None]) -> Path:
    """Return file `name` of the cache; if it is missing, `write` creates it.

    One process writes, the others wait for it.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncbn" / CACHE_VERSION
    path, part = folder / name, folder / f"{name}.part"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # The lock is released when its process ends, in any way. The file is renamed into place, so that no
    # reader sees an incomplete one.
    with part.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with part.open("wb") as file:
                write(file)
            part.rename(path)
    return path


DIGITS = 16
"""Number of hexadecimal digits, 4 bits each, which suffices to distinguish datasets."""


def digest(*parts: object) -> str:
    """Return a fingerprint of `parts`: bytes as they are, other objects as text."""
    total = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        total.update(len(content).to_bytes(8) + content)
    return total.hexdigest()[:DIGITS]
