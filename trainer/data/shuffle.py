"""Shuffled order of streamed rows, a function of seed and step."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.sampler import Indices
from trainer.errors import DataError

Rows = tuple[NDArray[Any], Indices]
"""Inputs (n, *shape) and labels (n,)."""

KEPT_BATCHES = 8
"""Number of cached batches: workers are at most one step apart, and request a few batches ahead."""


class RowOrder:
    """Order of the rows of files over an endless sequence of passes.

    Each pass permutes the files, and the rows within windows of the stream. Reading starts at the file in
    which a pass is entered, so resuming reads at most one file and one window in vain.
    """

    def __init__(
        self, rows: Indices, read: Callable[[int, Indices], Iterator[Rows]], seed: int | None, window: int = 0
    ) -> None:
        """Set the order.

        Args:
            rows: number of rows of each file, shape (F,).
            read: function that reads the rows of files, given the number of the pass and file indices, in the
                order of the indices.
            seed: seed of the permutations; None keeps the order of the files and ends after one pass.
            window: number of rows that are shuffled together; 0 keeps their order.
        """
        self._rows, self._read, self._seed, self._window = rows, read, seed, max(1, window)
        self._samples = int(rows.sum())

    def rows_from(self, position: int) -> Iterator[tuple[NDArray[Any], int]]:
        """Yield input and label of each row from number `position`, over all passes."""
        first, place = divmod(position, self._samples)
        yield from self._pass(first, place)
        if self._seed is not None:
            for number in count(first + 1):
                yield from self._pass(number, 0)

    def _pass(self, number: int, start: int) -> Iterator[tuple[NDArray[Any], int]]:
        files = np.arange(len(self._rows))
        if self._seed is not None:
            files = np.random.default_rng([self._seed, number]).permutation(files)
        ends = np.cumsum(self._rows[files])
        # Whole windows are read, since the permutation of a window needs all of its rows.
        window = start // self._window
        begin = window * self._window
        first = int(np.searchsorted(ends, begin, side="right"))
        before = int(ends[first] - self._rows[files[first]])
        source = _one_by_one(self._read(number, files[first:]))
        # The first file may begin before the window.
        for _ in islice(source, begin - before):
            pass
        while begin < self._samples:
            size = min(self._window, self._samples - begin)
            rows = list(islice(source, size))
            if len(rows) < size:
                raise DataError(
                    "data",
                    self._samples,
                    "must be files that do not change: there are fewer rows than counted at the start",
                )
            order = np.arange(size)
            if self._seed is not None and size > 1:
                order = np.random.default_rng([self._seed, number, window]).permutation(size)
            # Only the first window is entered in its middle.
            for place in order[max(0, start - begin) :]:
                yield rows[place]
            begin, window = begin + size, window + 1


class BatchCursor:
    """Batches of a stream by number; efficient for ascending numbers."""

    def __init__(
        self, rows_from: Callable[[int], Iterator[tuple[NDArray[Any], int]]], batch_size: int
    ) -> None:
        self._rows_from, self._batch_size = rows_from, batch_size
        self._rows: Iterator[tuple[NDArray[Any], int]] = iter(())
        self._next = -1
        self._kept: OrderedDict[int, Rows] = OrderedDict()

    def batch(self, number: int) -> Rows:
        """Return batch `number`; only the last batch of a finite stream is shorter."""
        if number not in self._kept:
            if number != self._next:
                self._rows = self._rows_from(number * self._batch_size)
            # After an error the generator would look finished, so the next request must start a new one.
            self._next = -1
            inputs, labels = zip(*islice(self._rows, self._batch_size), strict=True)
            self._kept[number] = np.stack(inputs), np.array(labels, dtype=np.int64)
            self._next = number + 1
            if len(self._kept) > KEPT_BATCHES:
                self._kept.popitem(last=False)
        return self._kept[number]


def _one_by_one(batches: Iterator[Rows]) -> Iterator[tuple[NDArray[Any], int]]:
    for inputs, labels in batches:
        yield from zip(inputs, labels.tolist(), strict=True)
