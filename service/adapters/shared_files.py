"""Files on storage that user code can write to.

User code of a job can put a link, a pipe or a huge file where the service expects its own file. The
service runs as another user, in compose also in another container, so a followed link would hand out what
only the service may read, and a pipe would keep a thread for ever. Below `root`, no link is followed, and
nothing but plain files is opened.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

NOT_PLAIN = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO)
"""Error numbers for a link, a file in place of a folder, and a socket."""
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_file(root: Path, path: Path) -> BinaryIO:
    """Open a plain file for reading. Raises FileNotFoundError for anything else."""
    try:
        with _folder(root, path.parent) as folder:
            handle = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if error.errno in NOT_PLAIN:
            raise FileNotFoundError(errno.ENOENT, "not a plain file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileNotFoundError(errno.ENOENT, "not a plain file", str(path))
    return os.fdopen(handle, "rb")


def make_file(root: Path, path: Path) -> None:
    """Create an empty file, with its folders, unless there is something of that name."""
    with _folder(root, path.parent, make=True) as folder, suppress(FileExistsError):
        os.close(os.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder))


def write_private_file(root: Path, path: Path, content: str) -> None:
    """Replace a file, with its folders, by one that only its user can read."""
    name = f".{path.name}.{os.urandom(8).hex()}"
    with _folder(root, path.parent, make=True) as folder:
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        with os.fdopen(handle, "w") as file:
            file.write(content)
        os.replace(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)


@contextmanager
def _folder(root: Path, path: Path, *, make: bool = False) -> Iterator[int]:
    """Open a folder below `root`.

    With `make`, create it, in place of a link or file of its name.
    """
    if make:
        root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in path.relative_to(root).parts:
            above = handle
            try:
                handle = _make_folder(name, above) if make else os.open(name, FOLDER, dir_fd=above)
            finally:
                if handle != above:
                    os.close(above)
        yield handle
    finally:
        os.close(handle)


def _make_folder(name: str, above: int) -> int:
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=above)
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=above)
    return os.open(name, FOLDER, dir_fd=above)
