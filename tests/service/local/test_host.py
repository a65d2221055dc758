"""Ports, private files and short folders."""

import socket
import stat
from pathlib import Path

import pytest

from service.local.host import (
    LOG_TAIL_LINES,
    PORTS,
    RAY_SUBFOLDER,
    choose_ports,
    is_free,
    keep_secret,
    short_folder,
    tail,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_chosen_ports_are_different_and_free():
    ports = choose_ports(20)
    assert len(set(ports)) == 20
    assert all(port in PORTS and is_free(port) for port in ports)


def test_port_in_use_is_not_chosen(monkeypatch):
    (first, second) = choose_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert not is_free(first)
        monkeypatch.setattr("secrets.SystemRandom.sample", lambda *_: [first, second])
        assert choose_ports(1) == [second]
        with pytest.raises(OSError, match="no 2 free ports"):
            choose_ports(2)


def test_secret_is_made_once_and_private(tmp_path):
    first = keep_secret(tmp_path / "token")
    assert len(first) >= 32
    assert mode(tmp_path / "token") == 0o600
    assert keep_secret(tmp_path / "token") == first


def test_the_short_folder_leaves_room_for_socket_paths(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    folder = short_folder(deep)
    assert (
        len(
            str(
                folder
                / RAY_SUBFOLDER
                / "session_2026-01-01_00-00-00_000000_4194304"
                / "sockets"
                / "dash_MetricsHead"
            )
        )
        <= 107
    )
    assert short_folder(deep) == folder
    assert short_folder(tmp_path) != folder
    monkeypatch.setattr("tempfile.tempdir", "/var/tmp")
    assert short_folder(deep).parent == Path("/var/tmp")


def test_tail_returns_the_last_lines(tmp_path):
    assert tail(tmp_path / "missing.log") == "(no log)"
    (tmp_path / "log").write_text("".join(f"{number}\n" for number in range(LOG_TAIL_LINES + 5)))
    assert tail(tmp_path / "log").splitlines() == [str(number) for number in range(5, LOG_TAIL_LINES + 5)]
