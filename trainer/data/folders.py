"""Folders with one folder of images per class."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from trainer.data.cache import cached
from trainer.data.digest import digest
from trainer.data.loading import Parts
from trainer.data.order import Indices
from trainer.data.transforms import decode
from trainer.errors import DataError
from trainer.spec import ImageFolderSpec

NAMED = 5
"""Of the images, or classes, that are wrong: so many an error names."""
CHUNK = 256
"""Images that a thread takes to decode at a time."""


@dataclass(frozen=True)
class FolderImages:
    """The images of one part: paths below `root`, ordered by name, and the numbers of their classes."""

    root: Path
    paths: list[str]
    numbers: Indices

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """See Images."""
        try:
            return decode(self.root / self.paths[index]), int(self.numbers[index])
        except OSError as error:
            raise DataError("data.root", self.name(index), f"takes images that can be read: {error}") from error

    def name(self, index: int) -> str:
        """See Images."""
        return str(self.root / self.paths[index])

    def labels(self) -> Indices:
        """See Images."""
        return self.numbers


def open_folders(spec: ImageFolderSpec) -> Parts:
    """List the images of both parts and make sure that each can be decoded, once for each state of the folder.

    Raises DataError for: a folder that is missing, has no classes or an empty one; classes to test on that are not trained; links
    out of the root; corrupt images, unless they are to be skipped.
    """
    root = Path(spec.root)
    train_files, test_files = (_list_classes(root, folder) for folder in (spec.train_folder, spec.test_folder))
    unknown = sorted(test_files.keys() - train_files.keys())
    if unknown:
        takes = f"takes the classes of {spec.train_folder!r}; not among them: {', '.join(unknown[:NAMED])}"
        raise DataError("data.test_folder", spec.test_folder, takes)
    files = [path for part in (train_files, test_files) for paths in part.values() for path in paths]
    states = {path: (root / path).stat() for path in files}
    corrupt = _find_corrupt(root, states)
    if corrupt and spec.corrupt_images == "refuse":
        named = ", ".join(sorted(corrupt)[:NAMED])
        raise DataError(
            "data.root",
            spec.root,
            f"takes images that can be read, or corrupt_images 'skip'; {len(corrupt)} cannot: {named}",
        )
    numbers = {name: number for number, name in enumerate(sorted(train_files))}
    training, testing = (_without(corrupt, part, root, numbers) for part in (train_files, test_files))
    kept = [(path, states[path].st_size) for part in (training, testing) for path in part.paths]
    return Parts(training, testing, len(numbers), digest("imagefolder", kept), len(corrupt))


def _list_classes(root: Path, part: str) -> dict[str, list[str]]:
    """List the images of each class of `root`/`part`, as paths below root."""
    folder = root / part
    if not folder.is_dir():
        raise DataError(
            "data.root", str(root), f"takes a folder that holds {part!r}, with a folder of images per class"
        )
    inside = root.resolve()
    _check_link(folder, inside)
    classes = {
        entry.name: [str(path.relative_to(root)) for path in _walk(entry, inside)]
        for entry in sorted(folder.iterdir())
        if entry.is_dir()
    }
    if not classes:
        raise DataError("data.root", str(folder), "takes a folder of images per class; there is none")
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise DataError(
            "data.root", str(folder), f"takes images in every class; there are none in {', '.join(empty[:NAMED])}"
        )
    return classes


def _walk(path: Path, inside: Path) -> Iterator[Path]:
    """Yield the images at and below `path` by name; links are followed where they stay below `inside`."""
    _check_link(path, inside)
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            yield from _walk(entry, inside)
    elif path.suffix.lower() in IMG_EXTENSIONS:
        yield path


def _check_link(path: Path, inside: Path) -> None:
    if not path.is_symlink():
        return
    target = path.resolve()
    if not target.is_relative_to(inside) or path.parent.resolve().is_relative_to(target):
        raise DataError("data.root", str(path), f"takes links that stay below {inside} and do not lead in a circle")


def _find_corrupt(root: Path, states: dict[str, os.stat_result]) -> frozenset[str]:
    """Decode all images and return those that cannot be; the answer is kept until a file's size or time of change differs."""
    paths = list(states)

    def find(start: int) -> list[str]:
        return [path for path in paths[start : start + CHUNK] if _is_corrupt(root / path)]

    def write(file: BinaryIO) -> None:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # decoding is outside of Python's lock
            corrupt = [path for found in threads.map(find, range(0, len(paths), CHUNK)) for path in found]
        file.write(json.dumps(corrupt).encode())

    listing = digest(root.resolve(), [(path, state.st_size, state.st_mtime_ns) for path, state in states.items()])
    return frozenset(json.loads(cached(f"corrupt-{listing}.json", write).read_text()))


def _is_corrupt(path: Path) -> bool:
    try:
        decode(path)
    except OSError:
        return True
    return False


def _without(corrupt: frozenset[str], part: dict[str, list[str]], root: Path, numbers: dict[str, int]) -> FolderImages:
    kept = {name: [path for path in paths if path not in corrupt] for name, paths in part.items()}
    empty = [name for name, paths in kept.items() if not paths]
    if empty:
        raise DataError(
            "data.root", str(root), f"takes a whole image in every class; all are corrupt in {', '.join(empty[:NAMED])}"
        )
    labels = np.array([numbers[name] for name, paths in kept.items() for _ in paths])
    return FolderImages(root, [path for paths in kept.values() for path in paths], labels)
