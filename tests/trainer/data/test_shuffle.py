import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.shuffle import KEPT_BATCHES, BatchCursor, RowOrder
from trainer.errors import DataError

counts = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(sum).map(np.array)


def make_order(rows, seed=0, window=0, blocks=3):
    """Return an order over files with consecutive row numbers, and the list of files that it reads."""
    starts, files_read = np.cumsum(rows) - rows, []

    def read(number, files):
        files_read.append(len(files))
        numbers = np.concatenate([np.arange(starts[file], starts[file] + rows[file]) for file in files])
        for start in range(0, len(numbers), blocks):
            part = numbers[start : start + blocks]
            yield part[:, None], part

    return RowOrder(rows, read, seed, window), files_read


def numbers_from(order, position, count):
    rows = order.rows_from(position)
    return [label for _, (_, label) in zip(range(count), rows, strict=False)]


@given(rows=counts, window=st.integers(0, 9), passes=st.integers(1, 3))
def test_each_pass_sees_every_row_once(rows, window, passes):
    row = numbers_from(make_order(rows, window=window)[0], 0, passes * rows.sum())
    for start in range(0, len(row), rows.sum()):
        assert sorted(row[start : start + rows.sum()]) == list(range(rows.sum()))


@given(
    rows=counts,
    window=st.integers(0, 9),
    position=st.integers(0, 60),
    seed=st.integers(0, 9),
    blocks=st.integers(1, 9),
)
def test_the_row_at_a_position_depends_only_on_the_seed(rows, window, position, seed, blocks):
    whole = numbers_from(make_order(rows, seed, window)[0], 0, position + 20)
    assert numbers_from(make_order(rows, seed, window, blocks)[0], position, 20) == whole[position:]


@given(rows=counts, position=st.integers(0, 60))
def test_test_data_keeps_its_order_and_ends(rows, position):
    order, _ = make_order(rows, seed=None)
    assert numbers_from(order, 0, 1_000) == list(range(rows.sum()))
    if position < rows.sum():
        assert numbers_from(order, position, 1_000) == list(range(position, rows.sum()))


def test_passes_seeds_and_windows_mix_differently():
    rows = np.array([50, 50])
    first, second = np.split(np.array(numbers_from(make_order(rows, window=20)[0], 0, 200)), 2)
    assert first.tolist() != second.tolist()
    assert first.tolist() != numbers_from(make_order(rows, 1, window=20)[0], 0, 100)
    assert first[:20].tolist() != sorted(first[:20])


def test_a_resumption_reads_only_the_remaining_files_of_the_pass():
    order, files_read = make_order(np.full(10, 10), window=5)
    numbers_from(order, 273, 1)
    assert files_read == [3]


def test_files_that_lost_rows_are_detected():
    order = RowOrder(
        np.array([5]), lambda number, files: iter([(np.zeros((4, 1)), np.zeros(4, np.int64))]), 0
    )
    with pytest.raises(DataError, match="fewer rows than counted at the start"):
        numbers_from(order, 0, 5)


@given(asked=st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_a_cursor_is_independent_of_the_order_of_requests(asked):
    order, _ = make_order(np.array([7, 6]), window=4)
    cursor, whole = BatchCursor(order.rows_from, 5), numbers_from(order, 0, 31 * 5)
    for number in asked:
        inputs, labels = cursor.batch(number)
        assert labels.tolist() == inputs[:, 0].tolist() == whole[number * 5 : number * 5 + 5]


def test_requests_of_several_workers_share_one_read():
    order, files_read = make_order(np.array([100]))
    cursor = BatchCursor(order.rows_from, 5)
    for number in range(15):
        for late in range(KEPT_BATCHES):
            cursor.batch(max(0, number - late))
    assert files_read == [1]


def test_an_unreadable_row_is_the_same_error_for_every_worker():
    def rows_from(position):
        yield np.zeros(2) + position, 0
        raise DataError("data.train", "x.tar", "must be whole images")

    cursor = BatchCursor(rows_from, 4)
    for _ in range(3):  # workers ask one after the other
        with pytest.raises(DataError, match="must be whole images"):
            cursor.batch(0)
