from datetime import UTC, datetime, timedelta

import pytest

from service.api.web.filters import ago, duration, number, plain, stamp

NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90_061, "1 d 1 h"),
    ],
)
def test_durations_have_their_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_times_are_shown_relative_and_in_utc():
    assert ago(NOW, NOW) == "just now"
    assert ago(NOW - timedelta(minutes=3, seconds=20), NOW) == "3 min ago"
    assert stamp(NOW) == "2026-03-02 09:30:00 UTC"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (float("-inf"), "-∞"),
        (3, "3"),
        (12_000.0, "12,000"),
        (0.123456, "0.1235"),
        (12345.67, "12,346"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_values_of_a_spec_are_shown_as_in_a_file():
    assert [plain(value) for value in ("sync", [1, 2], None, True)] == ["sync", "[1, 2]", "null", "true"]
