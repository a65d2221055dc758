"""Rules for image folders: ignored files, and classes by folder."""

from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""Folders that operating systems and archive tools create."""

MAX_NAMES = 20
"""Maximum number of names in a message."""


def list_some(names: Sequence[str]) -> str:
    """Join names for a message, up to `MAX_NAMES`."""
    others = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + others


def is_ignored(below: str) -> bool:
    """Return whether a path below the data's root is in a hidden or system folder."""
    return any(part.startswith(".") or part in SYSTEM_NAMES for part in below.strip("/").split("/"))


def path_below(path: str, root: str) -> str:
    """Return the part of a path below `root`; either may have its scheme in front."""
    root = root.partition("://")[2] or root
    return path[path.find(root) + len(root) :].strip("/")


def class_of(path: str, root: str) -> str | None:
    """Return the class of an image, the folder directly below `root`.

    Returns None for a file outside such a folder.
    """
    folder, separator, _ = path_below(path, root).partition("/")
    return folder if separator else None


@dataclass(frozen=True)
class ClassFolders:
    """Classes of the images below a folder."""

    root: str
    names: list[str]

    def label(self, path: str) -> int:
        """Return the label of the image at `path`."""
        return self.names.index(class_of(path, self.root) or "")
