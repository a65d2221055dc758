"""The thread that looks after collectives on a device's queue, over stand-ins for the device's events."""

import logging
import time

import pytest
import torch

from syncbn import DesyncError
from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.watchdog import INTERVAL_SECONDS, CollectiveWatchdog, Pending


class Event:
    """An event that answers in turn: an error is raised, and the last answer is repeated."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def query(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def desync(call, how):
    return DesyncError(f"{call}: {how}", call.site.name, call.phase, call.number, ())


def follow(watch, name, event, *, stamps=(1.0, 2.0), seconds=30.0, abort=lambda: None, expected=(1.0, 2.0)):
    call = LayerCollectives(name).next_call("forward")
    stamps = torch.tensor(stamps, dtype=torch.float64)
    watch.follow(Pending(call, event, stamps, list(expected), time.monotonic() + seconds, desync, abort))


def wait_for_failure(watch):
    deadline = time.monotonic() + 50 * INTERVAL_SECONDS
    while time.monotonic() < deadline:
        watch.raise_failure()
        time.sleep(0.01)


@pytest.mark.parametrize("answers", [(RuntimeError("CUDA error"), True), (*[RuntimeError("CUDA error")] * 2, True)])
def test_an_event_that_cannot_be_queried_is_logged_once_and_asked_again(caplog, answers):
    watch = CollectiveWatchdog()
    follow(watch, "norm1", Event(*answers))
    follow(watch, "norm2", Event(True), stamps=(3.0, 4.0))
    with pytest.raises(DesyncError, match="norm2, forward, call 1: paired with another call"):
        wait_for_failure(watch)
    errors = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage() for record in errors] == ["norm1, forward, call 1: its completion could not be queried"]
    assert errors[0].levelno == logging.ERROR


def test_an_event_that_never_answers_is_late():
    watch, aborted = CollectiveWatchdog(), []
    follow(watch, "norm1", Event(RuntimeError("CUDA error")), seconds=0.5, abort=lambda: aborted.append(1))
    with pytest.raises(DesyncError, match="norm1, forward, call 1: not complete after"):
        wait_for_failure(watch)
    assert aborted == [1]


def test_an_error_while_a_failure_is_handled_does_not_end_the_thread(caplog):
    def abort():
        raise AttributeError("this torch has no abort")

    watch = CollectiveWatchdog()
    follow(watch, "norm1", Event(False), seconds=0.0, abort=abort)
    with pytest.raises(DesyncError, match="norm1"):
        wait_for_failure(watch)
    follow(watch, "norm2", Event(True), stamps=(3.0, 4.0))
    with pytest.raises(DesyncError, match="norm2"):
        wait_for_failure(watch)
    assert "norm1, forward, call 1 cannot be checked" in caplog.text
