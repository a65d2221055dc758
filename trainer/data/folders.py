"""Image folders with one subfolder per class."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.data.cache import digest
from trainer.data.class_folders import is_ignored, list_some
from trainer.data.corrupt import image_errors
from trainer.data.dataset import Splits
from trainer.data.decoding import IMAGE_SUFFIXES, decode
from trainer.data.links import check_link
from trainer.data.sampler import Indices
from trainer.errors import DataError
from trainer.jobspec import ImageFolderSpec


@dataclass(frozen=True)
class FolderImages:
    """Images of one part (train or test).

    Paths below `root`, sorted by name, with the numbers of their classes.
    """

    root: Path
    paths: list[str]
    numbers: Indices

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """See Images."""
        with image_errors("data.root", self.name(index)):
            image = decode(self.root / self.paths[index])
        return image, int(self.numbers[index])

    def name(self, index: int) -> str:
        """See Images."""
        return str(self.root / self.paths[index])

    def labels(self) -> Indices:
        """See Images."""
        return self.numbers


def open_folders(spec: ImageFolderSpec) -> Splits:
    """List the images of both parts.

    Raises DataError for a missing folder, a folder without classes, an empty class, test classes that are not
    in the training data, and links out of the root.
    """
    root = Path(spec.root)
    train_files, test_files = (
        _list_classes(root, folder) for folder in (spec.train_folder, spec.test_folder)
    )
    unknown = sorted(test_files.keys() - train_files.keys())
    if unknown:
        rule = f"must have the classes of {spec.train_folder!r}; not among them: {list_some(unknown)}"
        raise DataError("data.test_folder", spec.test_folder, rule)
    numbers = {name: number for number, name in enumerate(sorted(train_files))}
    if len(numbers) < 2:
        raise DataError(
            "data.root", spec.root, f"must have two classes or more below {spec.train_folder!r}; there is one"
        )
    training, testing = (_number(part, root, numbers) for part in (train_files, test_files))
    # The digest uses names and sizes: hashing the content would read the whole dataset.
    sizes = [(path, (root / path).stat().st_size) for part in (training, testing) for path in part.paths]
    return Splits(training, testing, len(numbers), digest("imagefolder", sizes), sorted(train_files))


def _number(part: dict[str, list[str]], root: Path, numbers: dict[str, int]) -> FolderImages:
    labels = np.array([numbers[name] for name, paths in part.items() for _ in paths])
    return FolderImages(root, [path for paths in part.values() for path in paths], labels)


def _list_classes(root: Path, part: str) -> dict[str, list[str]]:
    """List the images of each class of `root`/`part`, as paths below root."""
    folder = root / part
    if not folder.is_dir():
        raise DataError(
            "data.root",
            str(root),
            f"must be a folder that contains {part!r}, with a folder of images per class",
        )
    inside = root.resolve()
    check_link(folder, inside)
    classes = {
        entry.name: [str(path.relative_to(root)) for path in _walk(entry, inside)]
        for entry in _list(folder, inside)
        if entry.is_dir()
    }
    if not classes:
        raise DataError("data.root", str(folder), "must contain a folder of images per class; there is none")
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        rule = f"must have images ({suffixes}) in every class; there are none in {list_some(empty)}"
        raise DataError("data.root", str(folder), rule)
    return classes


def _walk(path: Path, inside: Path) -> Iterator[Path]:
    """Yield the images at and below `path` by name; links must stay below `inside`."""
    if path.is_dir():
        for entry in _list(path, inside):
            yield from _walk(entry, inside)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield path


def _list(folder: Path, inside: Path) -> list[Path]:
    """List the entries of a folder that are not ignored, by name; check their links."""
    entries = sorted(entry for entry in folder.iterdir() if not is_ignored(entry.name))
    for entry in entries:
        check_link(entry, inside)
        if not entry.exists():
            raise DataError("data.root", str(entry), "must be a link to a file that exists")
    return entries
