"""Symbolic links in data folders, which must not lead out of them."""

import os
from pathlib import Path

from trainer.errors import DataError


def check_link(path: Path, inside: Path) -> None:
    """Raise DataError, naming `path`, if it is a link out of the resolved folder `inside`, or to a folder that it lies in."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except RuntimeError as error:  # links that lead to each other
        raise DataError("data.root", str(path), f"must be a link to a file that exists: {error}") from error
    if not target.is_relative_to(inside) or path.parent.resolve().is_relative_to(target):
        raise DataError(
            "data.root", str(path), f"must contain only links that stay below {inside} and do not lead in a circle"
        )


def check_links(root: Path) -> None:
    """Check all links at and below `root`, for readers that follow any link; missing files are left to the reader to report.

    Each folder is listed once, and nothing but links is looked at. Raises DataError for a link as `check_link` does, and for a
    folder that cannot be listed, since its files may be links too.
    """
    inside, waiting = root.resolve(), [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        check_link(Path(entry.path), inside)
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError("data.root", folder, f"must contain only folders that can be listed: {error}") from error
