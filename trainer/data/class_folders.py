"""Rules for image folders: files that count, and their classes."""

from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""Folders that operating systems and archive tools leave behind."""

MAX_NAMES = 20
"""Of those that a message lists."""


def list_some(names: Sequence[str]) -> str:
    """Join names for a message."""
    others = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + others


def is_ignored(below: str) -> bool:
    """Whether a path below the data's root is hidden, or in a hidden or a system folder."""
    return any(part.startswith(".") or part in SYSTEM_NAMES for part in below.strip("/").split("/"))


def path_below(path: str, root: str) -> str:
    """Return what follows `root` in a path below it, whether or not either has its scheme in front."""
    root = root.partition("://")[2] or root
    return path[path.find(root) + len(root) :].strip("/")


def class_of(path: str, root: str) -> str | None:
    """Return the class of an image: the folder directly below `root`; None for a file that lies in no such folder."""
    folder, separator, _ = path_below(path, root).partition("/")
    return folder if separator else None


@dataclass(frozen=True)
class ClassFolders:
    """The classes of the images below a folder."""

    root: str
    names: list[str]

    def label(self, path: str) -> int:
        """Return the label of an image at `path`."""
        return self.names.index(class_of(path, self.root) or "")
