import math
from xml.etree import ElementTree

import pytest

from service.domain.statistics import Interval
from service.rendering.series import Band, band_of
from service.rendering.svg import (
    COLOURS,
    STYLE_SHEET,
    Frame,
    IntervalRow,
    curves_chart,
    intervals_chart,
    legend,
)

FRAME = Frame(title="accuracy against step", x_label="step", y_label="accuracy", goal=0.8)


def parse(svg):
    return ElementTree.fromstring(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def test_a_chart_has_a_line_and_an_area_per_band_and_the_goal():
    bands = [band_of(name, [[(0, 0.1), (9, 0.8)], [(0, 0.2), (9, 0.9)]]) for name in ("none", "sync")]
    svg = parse(curves_chart(bands, FRAME))
    assert svg.get("aria-label") == "accuracy against step"
    assert len(svg.findall(".//path[@class='line']")) == 2
    assert len(svg.findall(".//path[@class='area']")) == 2
    assert len(svg.findall(".//line[@class='goal']")) == 1
    assert {group.get("class") for group in svg.findall("g")} == {"s0", "s1"}
    dashes = [line.get("stroke-dasharray") for line in svg.findall(".//path[@class='line']")]
    assert dashes == [None, "8 4"]  # not by colour alone


@pytest.mark.parametrize("curves", [[], [[]], [[(5, 0.5)]], [[(0, math.inf)]], [[(0, 1e-300), (1, 1e300)]]])
def test_charts_of_few_or_strange_points_are_drawn(curves):
    frame = Frame(title="t", x_label="x", y_label="y", goal=math.inf, is_log_x=True, is_log_y=True)
    for chart in (curves_chart([band_of("a", curves)], FRAME), curves_chart([band_of("a", curves)], frame)):
        assert "nan" not in chart
        assert "inf" not in chart
        parse(chart)


def test_a_long_line_is_thinned():
    steps = range(20_000)
    band = Band(label="a", x=steps, mean=[0.5] * 20_000, low=[0.5] * 20_000, high=[0.5] * 20_000)
    assert len(curves_chart([band], FRAME)) < 20_000


def test_texts_are_escaped_and_nothing_is_styled_inline():
    hostile = '<script>alert(1)</script>"onload="'
    frame = Frame(title=hostile, x_label=hostile, y_label=hostile)
    rows = [IntervalRow(hostile, 1.0, Interval(0.5, 2.0), 0)]
    for chart in (
        curves_chart([band_of(hostile, [[(0, 1), (1, 2)]])], frame),
        intervals_chart(rows, hostile, hostile, 1.0, is_log=True),
    ):
        assert "<script" not in chart
        assert "style=" not in chart
        parse(chart)
    assert "<script" not in legend([hostile])


def test_intervals_are_drawn_with_arrows_at_infinite_ends():
    rows = [
        IntervalRow("a", 9.0, Interval(8.0, 10.0), 1),
        IntervalRow("b", 3.0, Interval(2.0, math.inf), 2),
        IntervalRow("c", None, None, 3),
    ]
    svg = parse(intervals_chart(rows, "t", "ratio", 1.0, is_log=True))
    first, second, third = svg.findall("g")
    assert [group.get("class") for group in (first, second, third)] == ["s1", "s2", "s3"]
    assert sum("L" in path.get("d") for path in first.findall("path")) == 0
    assert sum("L" in path.get("d") for path in second.findall("path")) == 1  # the arrow
    assert third.findall("path") == []


def test_a_ratio_of_0_is_an_open_end_of_a_logarithmic_axis():
    svg = intervals_chart([IntervalRow("a", 0.2, Interval(0.0, 0.4), 0)], "t", "ratio", 1.0, is_log=True)
    assert sum("L" in path.get("d") for path in parse(svg).findall(".//path")) == 1


def contrast(colour, background):
    def luminance(text):
        parts = [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(colour), luminance(background)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_from_white(colour):
    assert contrast(colour, "#ffffff") >= 4.5
    assert colour in STYLE_SHEET
