"""Corrupt images: detection, replacement and count."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.dataset import Images
from trainer.data.decoding import MAX_IMAGE_PIXELS, UnsupportedImage
from trainer.data.sampler import Indices
from trainer.errors import CorruptImage, DataError

MAX_CORRUPT_IN_A_ROW = 100
"""Maximum run of corrupt images; longer runs mean that more than single files are damaged."""
MAX_NAMES_SHOWN = 5
"""Number of corrupt images that an error names."""
CORRUPT = -1
"""Label of a row whose image is corrupt."""


@contextmanager
def image_errors(field: str, name: str) -> Iterator[None]:
    """Convert errors of reading an image to errors with its name.

    Raises CorruptImage for everything that Pillow cannot read, which it reports by many classes of errors;
    DataError for errors of the storage, such as a missing file, and for an intact image that is not
    supported.
    """
    try:
        yield
    # The machine's problem, not that of the file.
    except MemoryError:
        raise
    except UnsupportedImage as error:
        raise DataError(field, name, f"must be {error}") from error
    except Image.DecompressionBombError as error:
        raise DataError(
            field, name, f"must be an image of at most {MAX_IMAGE_PIXELS:,} pixels: {error}"
        ) from error
    except Exception as error:
        rule = f"must be a readable image: {error}"
        is_of_storage = isinstance(error, OSError) and error.errno is not None
        if _is_of_pillow(error) and not is_of_storage:
            rule += "; `corrupt_images: skip` skips such images"
            raise CorruptImage(field, name, rule) from error
        if isinstance(error, OSError):
            raise DataError(field, name, rule) from error
        raise


def _is_of_pillow(error: Exception) -> bool:
    # Pillow raises errors of many classes, and its plugins too, so the origin decides.
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("PIL.") for frame, _ in frames)


class Sample(NamedTuple):
    """Image that was read."""

    place: int
    image: Any
    label: int
    skipped: list[str]
    """Names of the corrupt images that it replaces."""


def read_or_replace(images: Images, index: int, *, skip: bool, candidates: Indices | None = None) -> Sample:
    """Read image `index`, or with `skip` the next readable one, cyclically.

    The cycle is over all images, or over `candidates` (n,), which contains `index`, in its order. Raises
    CorruptImage without `skip`; DataError if too many images in a row are corrupt.
    """
    skipped: list[str] = []
    for place in islice(_candidates(images, index, candidates), MAX_CORRUPT_IN_A_ROW):
        try:
            return Sample(place, *images[place], skipped)
        except CorruptImage as error:
            if not skip:
                raise
            skipped.append(str(error.value))
    raise _too_many(skipped)


def _candidates(images: Images, index: int, candidates: Indices | None) -> Iterator[int]:
    yield index
    order = range(len(images)) if candidates is None else candidates
    start = index if candidates is None else int(np.flatnonzero(candidates == index)[0])
    for number in range(start + 1, start + len(order)):
        yield int(order[number % len(order)])


class Preprocessed(NamedTuple):
    """Rows of a stream: inputs (n, *shape), labels (n,), names of corrupt images.

    The name of a row is empty unless its image is corrupt.
    """

    inputs: NDArray[Any]
    labels: Indices
    corrupt: list[str]


def replace_corrupt(
    batches: Iterable[Preprocessed], from_start: Iterable[Preprocessed]
) -> Iterator[tuple[NDArray[Any], Indices]]:
    """Replace each corrupt row by the next readable one; yield inputs and labels.

    All other rows keep their positions. `from_start` starts at the beginning of the data, wherever `batches`
    start: its first readable row follows their last one. Raises DataError if too many rows in a row are
    corrupt.
    """
    skipped: list[str] = []
    for inputs, labels, corrupt in batches:
        chosen: list[int] = []
        for place, name in enumerate(corrupt):
            if name:
                _skip(name, skipped)
            else:
                # The readable row also takes the positions of the corrupt rows before it.
                chosen += [place] * (len(skipped) + 1)
                skipped.clear()
        yield inputs[chosen], labels[chosen]
    # Corrupt rows at the end are replaced from the start, as if the data were cyclic.
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
    """Yield batches unchanged; raise DataError if too many rows in a row are corrupt."""
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
    if len(skipped) == MAX_CORRUPT_IN_A_ROW:
        raise _too_many(skipped)


def _too_many(names: list[str]) -> DataError:
    """Return the error for a run of corrupt images."""
    others = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    named = ", ".join(names[:MAX_NAMES_SHOWN]) + others
    return DataError(
        "data.corrupt_images",
        "skip",
        f"must leave a readable image among {len(names)} in a row; all are corrupt: {named}",
    )


class SkippedImages:
    """Names of the skipped corrupt images; each is logged once."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """Names so far."""
        return frozenset(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Add names, and print the new ones."""
        for name in names:
            if name not in self._names:
                self._names.add(name)
                print(f"skipped a corrupt image: {name}", flush=True)
