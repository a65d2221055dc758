import time

import pytest

from syncbn.collectives.timeout import run_with_timeout


def test_a_result_and_an_error_are_handed_on():
    assert run_with_timeout(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_with_timeout(5, lambda: 1 / 0)


def test_what_takes_longer_is_left():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.1 s"):
        run_with_timeout(0.1, lambda: time.sleep(3))
    assert time.monotonic() - started < 2
