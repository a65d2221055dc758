"""Checks of symbolic links, which must not lead out of a data folder."""

import os
from pathlib import Path

from trainer.errors import DataError


def check_link(path: Path, inside: Path) -> None:
    """Raise DataError for a link out of the resolved folder `inside`, or a cycle."""
    if not path.is_symlink():
        return
    try:
        target = path.resolve()
    except RuntimeError as error:  # a cycle of links
        raise DataError("data.root", str(path), f"must be a link to a file that exists: {error}") from error
    if not target.is_relative_to(inside) or path.parent.resolve().is_relative_to(target):
        raise DataError(
            "data.root",
            str(path),
            f"must contain only links that stay below {inside} and form no cycle",
        )


def check_links(root: Path) -> None:
    """Check all links at and below `root`, for readers that follow links.

    Each folder is listed once, and only links are resolved; missing files are left to the reader. Raises
    DataError for a link as `check_link` does, and for a folder that cannot be listed, since its files may be
    links too.
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
            raise DataError(
                "data.root", folder, f"must contain only folders that can be listed: {error}"
            ) from error
