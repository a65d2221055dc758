"""Small JSON files that another process reads while we write: whole or not there, never torn."""

import os
import tempfile
from pathlib import Path

from pydantic import BaseModel


def write_whole(path: Path, content: BaseModel, *, durable: bool = True) -> None:
    """Write `content` as JSON to `path`, so that a reader sees the old file or the new one, even if this process is killed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        file.write(content.model_dump_json())
        file.flush()
        if durable:  # survives a loss of power too
            os.fsync(file.fileno())
    Path(name).replace(path)
