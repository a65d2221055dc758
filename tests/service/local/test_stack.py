"""Embedded stack with cheap processes: lock, failed starts, exits and signals.

`e2e/test_stack.py` tests the real processes.
"""

import fcntl
import os
import signal
import socket
from pathlib import Path

import psutil
import pytest

from service.local.host import RAY_SUBFOLDER, short_folder
from service.local.stack import (
    START_ATTEMPTS,
    LocalStack,
    StackError,
    first_signal_interrupts,
    read_connection,
    run_until_stopped,
)
from tests.service.local.fakes import mode


def test_connection_is_written_privately_and_removed_at_stop(tmp_path, fake_parts):
    data_dir = tmp_path / "data"
    with LocalStack(data_dir) as stack:
        assert read_connection(data_dir) == stack.connection
        assert mode(data_dir / "connection.json") == 0o600
        assert mode(data_dir) == 0o700
        assert set(stack.process_ids) == {"ray", "mlflow", "api"}
        assert stack.wait(0) is None
    with pytest.raises(StackError, match="no stack runs on"):
        read_connection(data_dir)
    assert not any(psutil.pid_exists(process_id) for process_id in stack.process_ids.values())


def test_a_missing_package_names_its_extra(tmp_path, fake_parts, monkeypatch):
    monkeypatch.setattr("service.local.stack.REQUIRED_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(
        StackError, match=r"not installed: no_such_package; pip install 'syncbn\[service,trainer\]'"
    ):
        LocalStack(tmp_path).start()


def test_second_stack_on_the_same_data_is_refused(tmp_path, fake_parts):
    with LocalStack(tmp_path) as first:
        with pytest.raises(StackError, match=f"another stack runs on {tmp_path}"):
            LocalStack(tmp_path).start()
        assert read_connection(tmp_path) == first.connection
    with LocalStack(tmp_path) as second:
        assert second.connection.token == first.connection.token


def test_a_second_start_of_a_running_stack_is_rejected_without_side_effects(tmp_path, fake_parts):
    with LocalStack(tmp_path) as stack:
        with pytest.raises(StackError, match="another stack runs"):
            stack.start()
        assert stack.wait(0) is None
        assert read_connection(tmp_path) == stack.connection


def test_files_left_by_a_crash_are_removed(tmp_path, fake_parts):
    short_folder(tmp_path).mkdir()
    (short_folder(tmp_path) / "old").touch()
    (tmp_path / "connection.json").write_text("old")
    fake_parts(ray='[ "$(cat connection.json)" != old ] && touch ray-ready; exec sleep 300')
    with LocalStack(tmp_path):
        assert mode(short_folder(tmp_path)) == 0o700
        assert [path.name for path in short_folder(tmp_path).iterdir()] == [RAY_SUBFOLDER]
    assert not short_folder(tmp_path).exists()


def test_data_stay_locked_until_the_last_process_exits(tmp_path, fake_parts):
    fake_parts(ray='trap "" TERM; touch ray-ready; sleep 300')
    with (tmp_path / "lock").open("w") as lock, LocalStack(tmp_path) as stack:
        os.close(stack._lock)  # as if this process had been killed, except for the lifeline
        stack._lock = None
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stack.stop()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failed_start_names_the_process_and_shows_its_log(tmp_path, fake_parts):
    fake_parts(mlflow="echo the disk is full >&2; exit 3")
    stack = LocalStack(tmp_path)
    with pytest.raises(
        StackError, match=r"(?s)mlflow ended with status 3; the end of .*mlflow.log:\nthe disk is full"
    ):
        stack.start()
    assert not any(psutil.pid_exists(process_id) for process_id in stack.process_ids.values())
    assert not (tmp_path / "connection.json").exists()
    assert is_unlocked(tmp_path)


def test_a_full_disk_is_a_readable_error(tmp_path, fake_parts, monkeypatch):
    monkeypatch.setattr("service.local.stack.MIN_FREE_BYTES", 10**18)
    with pytest.raises(StackError, match=r"its disk must have 1000000000000 MB free \(got [\d.]+ MB\)"):
        LocalStack(tmp_path / "data").start()
    assert not (tmp_path / "data" / "logs").exists()


def test_start_has_a_time_limit(tmp_path, fake_parts):
    fake_parts(ray="echo thinking; exec sleep 300")
    with pytest.raises(StackError, match=r"(?s)not ready after 1 s: ray; the end of .*ray.log:\nthinking"):
        LocalStack(tmp_path, start_timeout_seconds=1).start()
    assert is_unlocked(tmp_path)


def test_a_start_is_retried_with_other_ports_if_one_is_taken(tmp_path, fake_parts):
    fake_parts(
        mlflow="[ -e attempted ] || { touch attempted; echo address already in use; exit 1; }; "
        "touch mlflow-ready; sleep 300"
    )
    with LocalStack(tmp_path) as stack:
        assert (tmp_path / "logs" / "mlflow.log.1").read_text() == "address already in use\n"
        assert stack.wait(0) is None


def test_a_start_fails_after_repeated_port_conflicts(tmp_path, fake_parts):
    fake_parts(mlflow="echo again >> attempts; echo address already in use; exit 1")
    with pytest.raises(StackError, match="already in use"):
        LocalStack(tmp_path).start()
    assert len((tmp_path / "attempts").read_text().split()) == START_ATTEMPTS


def test_a_requested_port_must_be_free(tmp_path, fake_parts):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} is taken"):
            LocalStack(tmp_path, port=port).start()
    with LocalStack(tmp_path, port=port) as stack:
        assert stack.connection.url == f"http://127.0.0.1:{port}"


def test_the_exit_of_a_process_is_reported_with_its_log(tmp_path, fake_parts):
    fake_parts(ray="touch ray-ready; echo out of memory; exec sleep 300")
    with LocalStack(tmp_path, api=False) as stack:
        assert set(stack.process_ids) == {"ray", "mlflow"}
        os.kill(stack.process_ids["ray"], signal.SIGKILL)
        reason = stack.wait(10)
    assert reason.startswith("ray was killed by signal 9")
    assert reason.endswith("out of memory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_and_later_ones_are_ignored(number):
    before = signal.getsignal(number)
    with first_signal_interrupts():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        for later in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), later)
    assert signal.getsignal(number) == before


def test_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with first_signal_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_returns_a_reason_only_if_a_process_exits(tmp_path, fake_parts):
    interrupted = LocalStack(tmp_path)
    assert run_until_stopped(interrupted, lambda _connection: os.kill(os.getpid(), signal.SIGTERM)) is None
    broken = LocalStack(tmp_path)
    reason = run_until_stopped(broken, lambda _connection: os.kill(broken.process_ids["api"], signal.SIGKILL))
    assert reason.startswith("api was killed by signal 9")
    for stack in (interrupted, broken):
        assert not any(psutil.pid_exists(process_id) for process_id in stack.process_ids.values())


def is_unlocked(data_dir: Path) -> bool:
    with (data_dir / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
