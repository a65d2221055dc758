"""Atomic writes of small files, and durable writes of large ones with hashes."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel


def atomic_write(path: Path, content: BaseModel, *, durable: bool = True) -> None:
    """Write `content` as JSON to `path`, so that a reader sees the old file or the new one, even if this process is killed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(content.model_dump_json())
        file.flush()
        if durable:  # survives a loss of power too
            os.fsync(file.fileno())
    Path(name).replace(path)


class HashingWriter:
    """Writer that computes the SHA-256 of what it passes on."""

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
    """Have a local file survive a loss of power; other storages promise that once they have answered."""
    try:
        handle = stream.fileno()
    except (AttributeError, OSError):
        return
    stream.flush()
    os.fsync(handle)
