"""Corrupt images: detection, replacement and count."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.decoding import MAX_IMAGE_PIXELS, UnsupportedImage
from trainer.data.images import Images
from trainer.data.sampler import Indices
from trainer.errors import CorruptImage, DataError

MOST_IN_A_ROW = 100
"""Corrupt images: where there are more, it is hardly single files that are broken."""
NAMED = 5
"""Of them: so many an error names."""
CORRUPT = -1
"""The label of a row whose image is corrupt."""


@contextmanager
def reading(field: str, name: str) -> Iterator[None]:
    """Name the image that cannot be read inside.

    Raises CorruptImage for anything that Pillow cannot read, which it reports by many kinds of errors; DataError for what
    the storage has to say, such as that there is no such file, and for an intact image that is not supported.
    """
    try:
        yield
    except MemoryError:
        raise
    except UnsupportedImage as error:
        raise DataError(field, name, f"must be {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(field, name, f"must be an image of at most {MAX_IMAGE_PIXELS:,} pixels: {error}") from error
    except Exception as error:
        takes = f"must be a readable image: {error}"
        is_of_storage = isinstance(error, OSError) and error.errno is not None
        if _is_of_pillow(error) and not is_of_storage:
            takes += "; `corrupt_images: skip` leaves such images out"
            raise CorruptImage(field, name, takes) from error
        if isinstance(error, OSError):
            raise DataError(field, name, takes) from error
        raise


def _is_of_pillow(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("PIL.") for frame, _ in frames)


class Sample(NamedTuple):
    """An image that was read."""

    place: int
    image: Any
    label: int
    skipped: list[str]
    """Names of the corrupt images whose place it takes."""


def read(images: Images, index: int, *, skip: bool, among: Indices | None = None) -> Sample:
    """Read image `index`; or, to `skip` corrupt ones, the first readable one from there on, in a circle.

    The circle is that of all images, or of those `among` (n,) which `index` is, in their order.
    Raises CorruptImage, which is not to be skipped; DataError if too many are corrupt in a row.
    """
    skipped: list[str] = []
    for place in islice(_circle(images, index, among), MOST_IN_A_ROW):
        try:
            return Sample(place, *images[place], skipped)
        except CorruptImage as error:
            if not skip:
                raise
            skipped.append(str(error.value))
    raise _too_many(skipped)


def _circle(images: Images, index: int, among: Indices | None) -> Iterator[int]:
    yield index
    order = range(len(images)) if among is None else among
    start = index if among is None else int(np.flatnonzero(among == index)[0])
    for number in range(start + 1, start + len(order)):
        yield int(order[number % len(order)])


class Preprocessed(NamedTuple):
    """Rows of a stream: inputs (n, *shape), labels (n,), and of each the name of its image if that is corrupt, else nothing."""

    inputs: NDArray[Any]
    labels: Indices
    corrupt: list[str]


def replace_corrupt(
    batches: Iterable[Preprocessed], from_start: Iterable[Preprocessed]
) -> Iterator[tuple[NDArray[Any], Indices]]:
    """Put the next readable row in the place of each corrupt one, so that all others keep their places; yield inputs and labels.

    `from_start` begins where the data does, wherever `batches` begin: its first readable row follows on their last one.
    Raises DataError if too many are corrupt in a row.
    """
    skipped: list[str] = []
    for inputs, labels, corrupt in batches:
        chosen: list[int] = []
        for place, name in enumerate(corrupt):
            if name:
                _skip(name, skipped)
            else:
                chosen += [place] * (len(skipped) + 1)
                skipped.clear()
        yield inputs[chosen], labels[chosen]
    missing = len(skipped)
    for inputs, labels, corrupt in from_start if missing else ():
        for place, name in enumerate(corrupt):
            if not name:
                yield inputs[[place] * missing], labels[[place] * missing]
                return
            _skip(name, skipped)
    if missing:
        raise _too_many(skipped)


def refuse_many(batches: Iterable[Preprocessed]) -> Iterator[Preprocessed]:
    """Hand batches on as they are; raises DataError if too many rows are corrupt in a row."""
    skipped: list[str] = []
    for batch in batches:
        for name in batch.corrupt:
            if name:
                _skip(name, skipped)
            else:
                skipped.clear()
        yield batch


def _skip(name: str, skipped: list[str]) -> None:
    skipped.append(name)
    if len(skipped) == MOST_IN_A_ROW:
        raise _too_many(skipped)


def _too_many(names: list[str]) -> DataError:
    """Make an error of corrupt images, none of which is followed by a readable one."""
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    named = ", ".join(names[:NAMED]) + others
    return DataError(
        "data.corrupt_images",
        "skip",
        f"must leave a readable image among {len(names)} in a row; all are corrupt: {named}",
    )


class SkippedImages:
    """Names of the corrupt images that were left out; each is logged once."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """All so far."""
        return frozenset(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Take note of names, and print those that are new."""
        for name in names:
            if name not in self._names:
                self._names.add(name)
                print(f"left out a corrupt image: {name}", flush=True)
