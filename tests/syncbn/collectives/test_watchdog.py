"""The thread that observes collectives on a device stream, over progress numbers on the CPU."""

import time
import weakref
from unittest import mock

import pytest
import torch

from syncbn import DesyncError, GroupError
from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.watchdog import INTERVAL_SECONDS, CollectiveWatchdog, DeviceProgress, Pending
from syncbn.kernels import vectors
from syncbn.kernels.statistics import NEVER

CPU = torch.device("cpu")


class Group:
    """A process group that is aborted."""

    def __init__(self, error=None):
        self.error, self.aborted = error, 0

    def abort(self):
        self.aborted += 1
        if self.error is not None:
            raise self.error


def desync(call, how):
    return DesyncError(f"{call}: {how}", call.site.name, call.phase, call.number, ())


def issue(watch, name, group=None, seconds=30.0):
    """Issue a collective; return what completes it, with a stamp that is right or wrong."""
    site = LayerCollectives(name)
    site.timeout_seconds = seconds
    call = site.next_call("forward", group or Group())
    check = watch.follow(call, CPU, 2 * call.stamp, desync)

    def complete(stamp=call.stamp):
        vectors.note(torch.tensor([2.0 * stamp], dtype=torch.float64), check)

    return complete


def wait_for_failure(watch):
    deadline = time.monotonic() + 50 * INTERVAL_SECONDS
    while time.monotonic() < deadline:
        watch.raise_failure()
        time.sleep(0.01)


def test_of_many_calls_the_first_mispaired_one_is_named():
    watch = CollectiveWatchdog()
    calls = [issue(watch, f"norm{number}") for number in range(1000)]
    for number, complete in enumerate(calls):
        complete(*[7] * (number in (3, 500)))
    with pytest.raises(DesyncError, match="norm3, forward, call 1: paired with another call"):
        wait_for_failure(watch)


def test_a_call_that_was_complete_at_the_last_reading_is_still_known():
    """The numbers are two, and the flag may be read before it is written."""
    progress = DeviceProgress(CPU)
    call = LayerCollectives("norm1").next_call("forward", Group())
    progress.pending.append(Pending(1, call, time.monotonic() + 30, desync))
    readings = [(NEVER, 1), (1, 1)]
    with mock.patch.object(DeviceProgress, "read", side_effect=readings):
        assert progress.check() is None
        pending, how = progress.check()
    assert (pending.call, how) == (call, "paired with another call")


def test_an_observed_call_does_not_keep_its_group():
    watch, group = CollectiveWatchdog(), Group()
    issue(watch, "norm1", group)
    reference = weakref.ref(group)
    del group
    assert reference() is None
    with pytest.raises(GroupError, match="layer 'norm1': the process group of call 1 is gone"):
        _ = watch._devices[CPU].pending[0].call.group


def test_complete_calls_are_forgotten():
    watch = CollectiveWatchdog()
    for number in range(50):
        issue(watch, f"norm{number}")()
    issue(watch, "last")
    deadline = time.monotonic() + 5
    while len(watch._devices[CPU].pending) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pending.call.site.name for pending in watch._devices[CPU].pending] == ["last"]


def test_a_late_call_is_named_and_its_group_aborted():
    watch, group = CollectiveWatchdog(), Group()
    issue(watch, "norm1", group)()
    issue(watch, "norm2", group, seconds=0.5)
    with pytest.raises(DesyncError, match=r"norm2, forward, call 1: not complete after 0\.5 s"):
        wait_for_failure(watch)
    time.sleep(INTERVAL_SECONDS)
    assert group.aborted == 1


def test_a_call_that_was_late_does_not_hide_a_later_one():
    watch = CollectiveWatchdog()
    late = issue(watch, "norm1", seconds=0.0)
    with pytest.raises(DesyncError, match="norm1, forward, call 1: not complete"):
        wait_for_failure(watch)
    late(7)  # an aborted collective has any stamp
    time.sleep(3 * INTERVAL_SECONDS)
    issue(watch, "norm2")(7)
    with pytest.raises(DesyncError, match="norm2, forward, call 1: paired"):
        wait_for_failure(watch)


def test_a_call_that_could_not_be_queued_is_forgotten():
    watch = CollectiveWatchdog()
    call = LayerCollectives("norm1").next_call("forward", Group())
    watch.forget(watch.follow(call, CPU, 1, desync), CPU)
    assert not watch._devices[CPU].pending


def test_the_numbers_serve_after_a_first_call_in_inference_mode():
    watch = CollectiveWatchdog()
    with torch.inference_mode():
        issue(watch, "norm1")()
    issue(watch, "norm2")()
    assert watch._devices[CPU].numbers.tolist() == [NEVER, 2]


def test_progress_that_cannot_be_read_is_logged_once_and_read_again(caplog):
    watch = CollectiveWatchdog()
    complete = issue(watch, "norm1")
    progress = watch._devices[CPU]
    answers = iter([RuntimeError("CUDA error")] * 3)

    def read():
        for error in answers:
            raise error
        return DeviceProgress.read(progress)

    progress.read = read
    complete(7)
    with pytest.raises(DesyncError, match="norm1, forward, call 1: paired"):
        wait_for_failure(watch)
    messages = [record.getMessage() for record in caplog.records if record.exc_info]
    assert messages == ["the progress of collectives on cpu could not be read"]


def test_a_device_that_never_answers_is_late():
    watch = CollectiveWatchdog()
    issue(watch, "norm1", seconds=0.5)
    watch._devices[CPU].read = mock.Mock(side_effect=RuntimeError("CUDA error"))
    with pytest.raises(DesyncError, match="norm1, forward, call 1: not complete after"):
        wait_for_failure(watch)


@pytest.mark.parametrize("error", [AttributeError("no abort"), RuntimeError("NCCL is gone")])
def test_a_group_that_cannot_be_aborted_does_not_end_the_thread(caplog, error):
    watch = CollectiveWatchdog()
    group = Group(error)
    issue(watch, "norm1", group, seconds=0.0)
    with pytest.raises(DesyncError, match="norm1"):
        wait_for_failure(watch)
    assert group.aborted == 1
    issue(watch, "norm2")(7)
    with pytest.raises(DesyncError, match="norm2"):
        wait_for_failure(watch)
    assert "norm1, forward, call 1: its process group cannot be aborted" in caplog.text


def test_an_error_of_the_check_itself_does_not_end_the_thread(caplog):
    watch = CollectiveWatchdog()
    issue(watch, "norm1")
    progress = watch._devices[CPU]
    progress.check = mock.Mock(side_effect=ZeroDivisionError)
    time.sleep(2 * INTERVAL_SECONDS)
    assert progress.check.called
    del progress.check
    issue(watch, "norm2")(7)
    with pytest.raises(DesyncError, match="norm2"):
        wait_for_failure(watch)
    assert "the collectives on cpu cannot be checked" in caplog.text
