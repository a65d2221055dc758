"""The embedded stack around cheap parts: the lock, failed starts, deaths and signals. `e2e/test_stack.py` has the real ones."""

import fcntl
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import psutil
import pytest

from service.local import processes
from service.local.host import short_folder
from service.local.stack import (
    START_ATTEMPTS,
    LocalStack,
    StackError,
    first_signal_interrupts,
    read_connection,
    run_until_stopped,
)
from service.local.supervisor import ProcessSpec


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def fake_parts(monkeypatch):
    """Replace the real parts by shell scripts, each ready once the file `<name>-ready` exists in the data folder."""

    def install(**scripts: str) -> None:
        def make(name):
            return lambda layout: ProcessSpec(
                name=name,
                command=["sh", "-c", scripts.get(name, f"touch {name}-ready; exec sleep 300")],
                environment=dict(os.environ),
                log=str(layout.log(name)),
                stop_seconds=0.5,
            )

        for name, function in {"ray": "ray_head", "mlflow": "mlflow_server", "api": "api_server"}.items():
            monkeypatch.setattr(processes, function, make(name))
        monkeypatch.setattr(
            processes,
            "probes",
            lambda layout, _client: {
                name: (layout.data_dir / f"{name}-ready").exists for name in ("ray", "mlflow", "api")
            },
        )

    install()
    return install


def test_environment_is_closed_to_the_callers_ray_and_mlflow(tmp_path, monkeypatch, fake_parts):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("SYNCBN_POLL_SECONDS", "0.1")
    with LocalStack(tmp_path / "data") as stack:
        environment = stack.api_environment
    assert {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}.isdisjoint(environment)
    assert environment["SYNCBN_POLL_SECONDS"] == "0.1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment["RAY_AUTH_MODE"] == "token"
    assert mode(Path(environment["RAY_AUTH_TOKEN_PATH"])) == 0o600


def test_jobs_inherit_none_of_the_services_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCBN_SECRETS_FOLDER", "/secrets")
    monkeypatch.setenv("SYNCBN_TOKEN", "a-token-of-the-service")
    layout = processes.Layout(
        data_dir=tmp_path, ray_dir=tmp_path, ray_token_path=tmp_path / "ray-token", api_token="a-token-of-the-service",
        mlflow_secret="a-secret-of-the-service", cpus=1, api_port=1, mlflow_port=2, ray_port=3, ray_client_port=4,
    )  # fmt: skip
    environment = processes.ray_head(layout).environment
    assert not [name for name in environment if name.startswith("SYNCBN_")]
    assert not {"a-token-of-the-service", "a-secret-of-the-service"} & set(environment.values())


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


def test_a_missing_package_is_named_with_its_extra(tmp_path, fake_parts, monkeypatch):
    monkeypatch.setattr("service.local.stack.REQUIRED_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(StackError, match=r"not installed: no_such_package; pip install 'syncbn\[service,trainer\]'"):
        LocalStack(tmp_path).start()


def test_second_stack_on_the_same_data_is_refused(tmp_path, fake_parts):
    with LocalStack(tmp_path) as first:
        with pytest.raises(StackError, match=f"another stack runs on {tmp_path}"):
            LocalStack(tmp_path).start()
        assert read_connection(tmp_path) == first.connection
    with LocalStack(tmp_path) as second:
        assert second.connection.token == first.connection.token


def test_second_start_of_a_running_stack_is_refused_and_does_it_no_harm(tmp_path, fake_parts):
    with LocalStack(tmp_path) as stack:
        with pytest.raises(StackError, match="another stack runs"):
            stack.start()
        assert stack.wait(0) is None
        assert read_connection(tmp_path) == stack.connection


def test_what_a_crash_left_is_cleared(tmp_path, fake_parts):
    short_folder(tmp_path).mkdir()
    (short_folder(tmp_path) / "old").touch()
    (tmp_path / "connection.json").write_text("old")
    fake_parts(ray='[ "$(cat connection.json)" != old ] && touch ray-ready; exec sleep 300')
    with LocalStack(tmp_path):
        assert mode(short_folder(tmp_path)) == 0o700
        assert list(short_folder(tmp_path).iterdir()) == []
    assert not short_folder(tmp_path).exists()


def test_data_stay_locked_until_the_last_process_has_ended(tmp_path, fake_parts):
    fake_parts(ray='trap "" TERM; touch ray-ready; sleep 300')
    with (tmp_path / "lock").open("w") as lock, LocalStack(tmp_path) as stack:
        os.close(stack._lock)  # as if this process had been killed, but for the lifeline
        stack._lock = None
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stack.stop()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_failed_start_names_the_part_and_shows_its_log(tmp_path, fake_parts):
    fake_parts(mlflow="echo the disk is full >&2; exit 3")
    stack = LocalStack(tmp_path)
    with pytest.raises(StackError, match=r"(?s)mlflow ended with status 3; the end of .*mlflow.log:\nthe disk is full"):
        stack.start()
    assert not any(psutil.pid_exists(process_id) for process_id in stack.process_ids.values())
    assert not (tmp_path / "connection.json").exists()
    assert is_unlocked(tmp_path)


def test_a_disk_without_space_is_refused_in_words(tmp_path, fake_parts, monkeypatch):
    monkeypatch.setattr("service.local.stack.MIN_FREE_BYTES", 10**18)
    with pytest.raises(StackError, match=r"its disk must have 1000000000000 MB free \(got [\d.]+ MB\)"):
        LocalStack(tmp_path / "data").start()
    assert not (tmp_path / "data" / "logs").exists()


def test_start_has_a_time_limit(tmp_path, fake_parts):
    fake_parts(ray="echo thinking; exec sleep 300")
    with pytest.raises(StackError, match=r"(?s)not ready after 1 s: ray; the end of .*ray.log:\nthinking"):
        LocalStack(tmp_path, start_timeout_seconds=1).start()
    assert is_unlocked(tmp_path)


def test_start_is_tried_again_with_other_ports_when_one_was_taken(tmp_path, fake_parts):
    fake_parts(
        mlflow="[ -e tried ] || { touch tried; echo address already in use; exit 1; }; touch mlflow-ready; sleep 300"
    )
    with LocalStack(tmp_path) as stack:
        assert (tmp_path / "logs" / "mlflow.log.1").read_text() == "address already in use\n"
        assert stack.wait(0) is None


def test_start_is_given_up_when_ports_are_taken_again_and_again(tmp_path, fake_parts):
    fake_parts(mlflow="echo again >> tries; echo address already in use; exit 1")
    with pytest.raises(StackError, match="already in use"):
        LocalStack(tmp_path).start()
    assert len((tmp_path / "tries").read_text().split()) == START_ATTEMPTS


def test_port_asked_for_must_be_free(tmp_path, fake_parts):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} is taken"):
            LocalStack(tmp_path, port=port).start()
    with LocalStack(tmp_path, port=port) as stack:
        assert stack.connection.url == f"http://127.0.0.1:{port}"


def test_death_of_a_part_is_told_with_its_log(tmp_path, fake_parts):
    fake_parts(ray="touch ray-ready; echo out of memory; exec sleep 300")
    with LocalStack(tmp_path, api=False) as stack:
        assert set(stack.process_ids) == {"ray", "mlflow"}
        os.kill(stack.process_ids["ray"], signal.SIGKILL)
        reason = stack.wait(10)
    assert reason.startswith("ray was killed by signal 9")
    assert reason.endswith("out of memory")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_interrupts_and_later_ones_do_nothing(number):
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


def test_run_ends_without_a_reason_when_told_and_with_one_when_a_part_dies(tmp_path, fake_parts):
    told = LocalStack(tmp_path)
    assert run_until_stopped(told, lambda _connection: os.kill(os.getpid(), signal.SIGTERM)) is None
    broken = LocalStack(tmp_path)
    reason = run_until_stopped(broken, lambda _connection: os.kill(broken.process_ids["api"], signal.SIGKILL))
    assert reason.startswith("api was killed by signal 9")
    for stack in (told, broken):
        assert not any(psutil.pid_exists(process_id) for process_id in stack.process_ids.values())


def is_unlocked(data_dir: Path) -> bool:
    with (data_dir / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
