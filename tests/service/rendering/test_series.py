import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rendering.series import Band, band_of, smooth, smoothed, thin, with_x


def test_a_band_is_the_mean_and_range_over_runs():
    band = band_of("sync", [[(0, 0.0), (10, 1.0)], [(0, 0.2), (10, 0.6)]])
    assert (band.label, list(band.x)) == ("sync", [0, 10])
    assert band.mean == pytest.approx([0.1, 0.8])
    assert (band.low, band.high) == ([0.0, 0.6], [0.2, 1.0])


def test_runs_with_other_steps_are_interpolated_and_a_short_one_does_not_end_the_band():
    band = band_of("sync", [[(0, 0.0), (10, 1.0)], [(5, 0.0), (10, 0.0), (20, 0.0)]])
    assert list(band.x) == [0, 5, 10, 20]
    assert band.high == [0.0, 0.5, 1.0, 0.0]
    assert band.mean == [0.0, 0.25, 0.5, 0.0]


def test_bands_of_many_points_are_made_in_linear_time():
    curve = [(step, 0.5) for step in range(20_000)]
    began = time.perf_counter()
    assert len(band_of("none", [curve] * 6).x) == 20_000
    assert time.perf_counter() - began < 5


def test_values_that_are_not_finite_are_left_out():
    band = band_of("none", [[(0, 1.0), (1, math.inf), (2, 3.0)], [(0, 1.0), (1, math.nan), (2, 3.0)], []])
    assert (list(band.x), list(band.mean)) == ([0, 2], [1.0, 3.0])
    assert list(band_of("none", [[], [(0, math.inf)]]).x) == []


def test_a_band_over_seconds():
    band = band_of("sync", [[(0, 0.1), (100, 0.5), (200, 0.9)]])
    over_time = with_x(band, [(0, 1.0), (100, 3.0)])
    assert (over_time.x, over_time.mean) == ([1.0, 3.0], [0.1, 0.5])


def test_smoothing_starts_at_the_first_value_and_keeps_constants():
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])
    band = Band(label="x", x=[0, 1], mean=[1, 0], low=[1, 0], high=[1, 0])
    assert smoothed(band, 0.5).mean == pytest.approx([1.0, 1 / 3])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3_000), st.integers(4, 400))
def test_thinning_keeps_both_ends_and_all_extremes(values, most):
    points = list(enumerate(values))
    kept = thin(points, most)
    assert len(kept) <= max(most, 0)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert kept == sorted(kept)
    assert (min(v for _, v in kept), max(v for _, v in kept)) == (min(values), max(values))


def test_a_spike_of_three_points_in_20000_is_visible():
    noise = random.Random(0)
    points = [(step, noise.gauss(0, 0.01)) for step in range(20_000)]
    for step in (12_345, 12_346, 12_347):
        points[step] = (step, 9.0)
    kept = thin(points)
    assert len(kept) <= 800
    assert any(value == 9.0 for _, value in kept)
