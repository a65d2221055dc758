"""Attempt lock of the driver: heartbeats, and exit after the service has closed the attempt."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from trainer.driver.heartbeat import (
    ENDED,
    HEARTBEAT_TIMEOUT_SECONDS,
    MAX_HEARTBEAT_AGE_SECONDS,
    ORPHANS_SECONDS,
    AttemptLock,
)
from trainer.jobspec import CLOSED_FILE, DRIVER_FILE, NOT_STARTED, STORAGE_FAILED, attempt_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("trainer.driver.heartbeat.HEARTBEAT_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr("trainer.driver.heartbeat.ORPHANS_SECONDS", 0.5)
    monkeypatch.setattr("trainer.driver.heartbeat.HEARTBEAT_TIMEOUT_SECONDS", 1.0)


def file_of(folder, attempt=1):
    return attempt_folder(folder, attempt) / DRIVER_FILE


def test_the_first_driver_takes_the_lock_and_writes_heartbeats(tmp_path):
    first = AttemptLock(tmp_path, 1)
    assert first.acquire() is None
    assert AttemptLock(tmp_path, 1).acquire() == "this attempt already has a driver"
    seen = file_of(tmp_path).stat().st_mtime
    deadline = time.monotonic() + 5
    while file_of(tmp_path).stat().st_mtime == seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.end()
    assert file_of(tmp_path).read_bytes() == ENDED
    assert AttemptLock(tmp_path, 1).acquire() == "this attempt already has a driver"


def test_a_closed_attempt_is_not_started(tmp_path):
    attempt_folder(tmp_path, 1).mkdir()
    (attempt_folder(tmp_path, 1) / CLOSED_FILE).touch()
    assert AttemptLock(tmp_path, 1).acquire() == "the service has closed this attempt"
    assert not file_of(tmp_path).exists()


def test_an_attempt_waits_for_the_end_of_the_previous_driver(tmp_path):
    before = AttemptLock(tmp_path, 1)
    before.acquire()
    began = time.monotonic()
    before.end()
    second = AttemptLock(tmp_path, 2)
    assert second.acquire() is None
    assert time.monotonic() - began < 0.4  # it has ended and recorded it
    second._is_over.set()  # it stops its heartbeats, and may still live
    began = time.monotonic()
    third = AttemptLock(tmp_path, 3)
    assert third.acquire() is None
    assert time.monotonic() - began >= 1.0
    third.end()


def test_dead_drivers_are_awaited_concurrently(tmp_path):
    for attempt in range(1, 5):
        file_of(tmp_path, attempt).parent.mkdir()
        file_of(tmp_path, attempt).touch()  # killed: it did not record its end
    began = time.monotonic()
    fifth = AttemptLock(tmp_path, 5)
    assert fifth.acquire() is None
    assert 1.0 <= time.monotonic() - began < 1.9
    fifth.end()


@pytest.mark.parametrize(("machine", "seconds"), [("own", 0.5), ("other", 1.0)])
def test_a_driver_on_another_machine_is_awaited_until_its_own_timeout(
    tmp_path, monkeypatch, machine, seconds
):
    assert HEARTBEAT_TIMEOUT_SECONDS > MAX_HEARTBEAT_AGE_SECONDS + ORPHANS_SECONDS
    program = (
        "import os, sys; from pathlib import Path; from trainer.driver.heartbeat import AttemptLock; "
        "AttemptLock(Path(sys.argv[1]), 1).acquire(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60)
    if machine == "other":
        identity = file_of(tmp_path).read_bytes().split(b" ", 1)[1]
        file_of(tmp_path).write_bytes(b"another-machine " + identity)
    began = time.monotonic()
    second = AttemptLock(tmp_path, 2)
    assert second.acquire() is None
    assert seconds <= time.monotonic() - began < seconds + 0.45
    second.end()


def test_an_attempt_waits_for_all_earlier_drivers(tmp_path):
    first = AttemptLock(tmp_path, 1)
    first.acquire()
    threading.Timer(1.0, first.end).start()
    attempt_folder(tmp_path, 2).mkdir()  # it never had a driver
    began = time.monotonic()
    third = AttemptLock(tmp_path, 3)
    assert third.acquire() is None
    assert time.monotonic() - began >= 0.9
    third.end()


def test_a_slowly_ending_driver_is_awaited(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.driver.heartbeat.os.kill", lambda *_: None)
    first = AttemptLock(tmp_path, 1)
    first.acquire()
    (attempt_folder(tmp_path, 1) / CLOSED_FILE).touch()
    threading.Timer(1.5, first.end).start()
    began = time.monotonic()
    second = AttemptLock(tmp_path, 2)
    assert second.acquire() is None
    assert time.monotonic() - began >= 1.3
    second.end()


SCRIPT = """
import sys, time
from pathlib import Path
import trainer.driver.heartbeat
trainer.driver.heartbeat.HEARTBEAT_INTERVAL_SECONDS, trainer.driver.heartbeat.END_TIMEOUT_SECONDS = 0.05, 1.0
trainer.driver.heartbeat.MAX_HEARTBEAT_AGE_SECONDS = 1.0
lock = trainer.driver.heartbeat.AttemptLock(Path(sys.argv[1]), 1)
assert lock.acquire() is None
print("lives", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        if sys.argv[2] == "heeds":
            lock.end()
            sys.exit(130)
"""


def test_a_driver_that_cannot_write_heartbeats_ends(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path, "stubborn"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        assert process.stdout.readline() == "lives\n"
        file_of(tmp_path).unlink()
        assert process.wait(10) == STORAGE_FAILED
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(("manner", "code"), [("heeds", 130), ("stubborn", NOT_STARTED)])
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
