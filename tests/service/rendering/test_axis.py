import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rendering.axis import Axis, axis_over, label_of


def test_ticks_are_round_numbers():
    axis = axis_over([0, 1200], 0, 100)
    assert [label for _, label in axis.ticks()] == ["0", "250", "500", "750", "1,000"]
    assert [value for value, _ in axis_over([0.1, 0.95], 0, 100).ticks()] == [0.2, 0.4, 0.6, 0.8]


def test_logarithmic_ticks_are_powers_or_1_2_and_5():
    assert [value for value, _ in axis_over([1, 1e6], 0, 100, is_log=True).ticks()] == [1, 100, 1e4, 1e6]
    assert [value for value, _ in axis_over([1, 12], 0, 100, is_log=True).ticks()] == [1, 2, 5, 10]


def test_places_are_within_the_axis():
    axis = axis_over([0, 10], 100, 0)
    assert [axis.place(value) for value in (0, 5, 10, -5, math.inf)] == [100, 50, 0, 100, 0]
    assert axis_over([1, 100], 0, 100, is_log=True).place(10) == 50


@pytest.mark.parametrize("values", [[], [5.0], [0.0], [math.inf], [math.nan], [math.inf, 2.0]])
@pytest.mark.parametrize("is_log", [False, True])
def test_axes_of_few_or_strange_values(values, is_log):
    axis = axis_over(values, 0, 100, is_log=is_log)
    assert axis.low < axis.high
    assert all(0 <= axis.place(value) <= 100 for value, _ in axis.ticks())


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_there_are_a_few_ticks_for_every_range(low, width):
    if low + width > low + 1e-9 * abs(low):
        ticks = Axis(low=low, high=low + width, start=0, end=100).ticks()
        assert len(ticks) <= 11


def test_labels_are_short():
    numbers = (0, 0.05, 1500, 20_000, 0.00001, 3e7)
    assert [label_of(number) for number in numbers] == ["0", "0.05", "1,500", "20k", "1e-05", "3e+07"]
