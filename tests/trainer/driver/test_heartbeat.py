"""An attempt has one driver, which shows that it lives, and ends itself once the service has closed the attempt."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainer.driver.heartbeat import ENDED, AttemptLock
from trainer.jobspec import CLOSED_FILE, DRIVER_FILE, attempt_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("trainer.driver.heartbeat.SECONDS_BETWEEN_SIGNS", 0.05)
    monkeypatch.setattr("trainer.driver.heartbeat.HEARTBEAT_TIMEOUT_SECONDS", 0.5)


def file_of(folder, attempt=1):
    return attempt_folder(folder, attempt) / DRIVER_FILE


def test_the_first_takes_the_attempt_and_shows_that_it_lives(tmp_path):
    first = AttemptLock(tmp_path, 1)
    assert first.claim() is None
    assert AttemptLock(tmp_path, 1).claim() == "this attempt has had its driver"
    seen = file_of(tmp_path).stat().st_mtime
    deadline = time.monotonic() + 5
    while file_of(tmp_path).stat().st_mtime == seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.end()
    assert file_of(tmp_path).read_bytes() == ENDED
    assert AttemptLock(tmp_path, 1).claim() == "this attempt has had its driver"


def test_what_the_service_has_closed_is_not_started(tmp_path):
    attempt_folder(tmp_path, 1).mkdir()
    (attempt_folder(tmp_path, 1) / CLOSED_FILE).touch()
    assert AttemptLock(tmp_path, 1).claim() == "the service has ended this attempt"
    assert not file_of(tmp_path).exists()


def test_another_attempt_waits_until_the_driver_before_it_is_dead(tmp_path):
    before = AttemptLock(tmp_path, 1)
    before.claim()
    began = time.monotonic()
    before.end()
    second = AttemptLock(tmp_path, 2)
    assert second.claim() is None
    assert time.monotonic() - began < 0.4  # it has ended, and said so
    second._is_over.set()  # killed: it says nothing any more
    began = time.monotonic()
    third = AttemptLock(tmp_path, 3)
    assert third.claim() is None
    assert time.monotonic() - began >= 0.5
    third.end()


def test_dead_drivers_are_waited_for_side_by_side(tmp_path):
    for attempt in range(1, 5):
        file_of(tmp_path, attempt).parent.mkdir()
        file_of(tmp_path, attempt).touch()  # killed: it never said that it has ended
    began = time.monotonic()
    fifth = AttemptLock(tmp_path, 5)
    assert fifth.claim() is None
    assert 0.5 <= time.monotonic() - began < 1.2
    fifth.end()


def test_another_attempt_waits_for_all_before_it(tmp_path):
    first = AttemptLock(tmp_path, 1)
    first.claim()
    threading.Timer(1.0, first.end).start()
    attempt_folder(tmp_path, 2).mkdir()  # it never had a driver
    began = time.monotonic()
    third = AttemptLock(tmp_path, 3)
    assert third.claim() is None
    assert time.monotonic() - began >= 0.9
    third.end()


def test_a_driver_that_ends_slowly_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.driver.heartbeat.os.kill", lambda *_: None)
    first = AttemptLock(tmp_path, 1)
    first.claim()
    (attempt_folder(tmp_path, 1) / CLOSED_FILE).touch()
    threading.Timer(1.5, first.end).start()
    began = time.monotonic()
    second = AttemptLock(tmp_path, 2)
    assert second.claim() is None
    assert time.monotonic() - began >= 1.3
    second.end()


SCRIPT = """
import sys, time
from pathlib import Path
import trainer.driver.heartbeat
trainer.driver.heartbeat.SECONDS_BETWEEN_SIGNS, trainer.driver.heartbeat.SECONDS_TO_END = 0.05, 1.0
trainer.driver.heartbeat.SECONDS_WITHOUT_SIGN = 1.0
presence = trainer.driver.heartbeat.AttemptLock(Path(sys.argv[1]), 1)
assert presence.claim() is None
print("lives", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        if sys.argv[2] == "heeds":
            presence.end()
            sys.exit(130)
"""


def test_a_driver_that_cannot_show_that_it_lives_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path, "stubborn"], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout.readline() == "lives\n"
        file_of(tmp_path).unlink()
        assert process.wait(10) == 3
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("manner", "code"), [("heeds", 130), ("stubborn", 3)])
def test_a_driver_ends_once_its_attempt_is_closed(tmp_path, manner, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path, manner], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stdout.readline() == "lives\n"
        (attempt_folder(tmp_path, 1) / CLOSED_FILE).touch()
        assert process.wait(10) == code
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()
