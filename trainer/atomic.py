"""Atomic writes of small files, and durable writes of large ones with hashes."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO


def atomic_write(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file atomically, readable only by its user.

    Args:
        path: path of the file.
        text: content of the file.
        durable: whether to wait until the content survives a loss of power.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    Path(name).replace(path)


class HashingWriter:
    """Writer that computes the SHA-256 of the written data."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest, self.size = hashlib.sha256(), 0
        self.error: Exception | None = None

    def write(self, data: bytes) -> int:
        """Write and hash; the first error is kept in `error`, as callers may hide it."""
        self.digest.update(data)
        self.size += len(data)
        try:
            return self._stream.write(data)
        except Exception as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def to_disk(stream: Any) -> None:
    """Flush a local file to disk.

    Other storages are durable once they have answered.
    """
    try:
        handle = stream.fileno()
    except (AttributeError, OSError):
        return
    stream.flush()
    os.fsync(handle)
