"""Replacement of corrupt rows in a stream, without Ray."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.corrupt import MAX_CORRUPT_IN_A_ROW, Preprocessed, refuse_many, replace_corrupt
from trainer.data.shuffle import RowOrder
from trainer.errors import DataError


def prepare(numbers, corrupt, blocks=3):
    """Return rows with their number as input and label, in blocks like those of Ray Data."""
    for start in range(0, len(numbers), blocks):
        part = np.array(numbers[start : start + blocks])
        names = [f"row {number}" if number in corrupt else "" for number in part.tolist()]
        labels = np.where([bool(name) for name in names], -1, part)
        yield Preprocessed(part[:, None], labels, names)


def replaced(numbers, corrupt, whole=(), blocks=3):
    rows = replace_corrupt(prepare(numbers, corrupt, blocks), prepare(whole, corrupt, blocks))
    return [label for _, labels in rows for label in labels.tolist()]


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [
        (set(), [0, 1, 2, 3, 4, 5, 6]),
        ({0}, [1, 1, 2, 3, 4, 5, 6]),
        ({1, 2, 3, 4, 5}, [0, 6, 6, 6, 6, 6, 6]),
        ({6}, [0, 1, 2, 3, 4, 5, 0]),
        ({0, 1, 5, 6}, [2, 2, 2, 3, 4, 2, 2]),
    ],
)
def test_a_corrupt_row_is_replaced_by_the_next_readable_one(corrupt, expected):
    assert replaced(range(7), corrupt, range(7)) == expected


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(sum).map(np.array),
    corrupt=st.sets(st.integers(0, 41)),
    window=st.integers(0, 9),
    position=st.integers(0, 60),
    blocks=st.integers(1, 9),
)
def test_a_row_does_not_depend_on_the_start_of_reading(sizes, corrupt, window, position, blocks):
    """Also if no readable row remains until the end of a pass."""
    starts, samples = np.cumsum(sizes) - sizes, int(sizes.sum())
    corrupt = corrupt - {samples // 2}

    def read_files(_, files):
        numbers = np.concatenate([np.arange(starts[file], starts[file] + sizes[file]) for file in files])
        return replace_corrupt(prepare(numbers, corrupt, blocks), prepare(range(samples), corrupt))

    order = RowOrder(sizes, read_files, 0, window)
    whole = [label for _, (_, label) in zip(range(position + 20), order.rows_from(0), strict=False)]
    assert [label for _, (_, label) in zip(range(20), order.rows_from(position), strict=False)] == whole[
        position:
    ]
    assert not corrupt & set(whole)


def test_too_many_consecutive_corrupt_rows_end_the_stream():
    rows = range(MAX_CORRUPT_IN_A_ROW + 2)
    assert replaced(rows, set(rows[1:-2]), rows)[1:] == [rows[-2]] * (MAX_CORRUPT_IN_A_ROW - 1) + [
        rows[-2],
        rows[-1],
    ]
    with pytest.raises(DataError, match=r"100 in a row; all are corrupt: row 1, .* and 95 more"):
        replaced(rows, set(rows[1:-1]), rows)
    with pytest.raises(DataError, match=r"100 in a row"):  # over the end, and on from the start
        replaced(rows, {*rows[:50], *rows[-50:]}, rows)
    with pytest.raises(DataError, match=r"6 in a row; all are corrupt: row 0"):
        replaced(range(3), {0, 1, 2}, range(3))


def test_too_many_consecutive_corrupt_test_rows_end_the_stream():
    rows = range(MAX_CORRUPT_IN_A_ROW + 5)
    left = [
        label
        for batch in refuse_many(prepare(rows, {*rows[1:-5], *rows[-4:]}))
        for label in batch.labels.tolist()
    ]
    assert [label for label in left if label >= 0] == [rows[0], rows[-5]]
    with pytest.raises(DataError, match=r"100 in a row; all are corrupt: row 1, .* and 95 more"):
        list(refuse_many(prepare(rows, set(rows[1:-4]))))
