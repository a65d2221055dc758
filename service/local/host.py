"""Host resources of a stack: free ports, private files, short folders."""

import os
import secrets
import socket
import tempfile
from hashlib import sha256
from pathlib import Path

HOST = "127.0.0.1"
# Below the range from which Linux hands out ports by itself, so that none is taken between choice and use.
PORTS = range(20_000, 32_000)
LOG_TAIL_LINES = 20
# Ray puts sockets up to 68 characters deeper than its folder (20 characters below this root); an AF_UNIX path holds 107.
LONGEST_TEMPORARY_ROOT = 19


def choose_ports(count: int) -> list[int]:
    """Return different free ports."""
    chosen: list[int] = []
    for port in secrets.SystemRandom().sample(PORTS, 100 * count):
        if is_free(port):
            chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise OSError(f"no {count} free ports found between {PORTS.start} and {PORTS.stop}")


def is_free(port: int) -> bool:
    """Return whether a port of the loopback address is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def keep_secret(path: Path) -> str:
    """Return the token in a file, which is created at the first call."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32))
    return path.read_text()


def write_private(path: Path, text: str) -> None:
    """Write a file atomically, readable only by its user."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def short_folder(data_dir: Path) -> Path:
    """Return the temporary folder of a data folder: a constant path, short enough for Ray."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_TEMPORARY_ROOT:
        root = Path("/tmp")  # noqa: S108 - users of the folder create it, for its owner only
    return root / f"syncbn-{sha256(f'{os.getuid()}:{data_dir}'.encode()).hexdigest()[:12]}"


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]) if log.exists() else "(no log)"
