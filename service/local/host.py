"""Host resources of a stack: free ports, private files, short folders."""

import os
import secrets
import socket
import tempfile
from hashlib import sha256
from pathlib import Path

from trainer.atomic import atomic_write

HOST = "127.0.0.1"
# Below the range from which Linux hands out ports by itself, so that none is taken between choice and use.
PORTS = range(20_000, 32_000)
LOG_TAIL_LINES = 20
# Ray puts sockets up to 68 characters deeper than its folder (20 characters below this root, RAY_SUBFOLDER
# included); an AF_UNIX path holds 107.
MAX_TEMPORARY_ROOT_CHARS = 19
RAY_SUBFOLDER = "r"
"""Ray's folder inside a private one, since Ray opens its own, with logs and sockets, to all users of the
machine.
"""


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
        atomic_write(path, secrets.token_urlsafe(32))
    return path.read_text()


def short_folder(data_dir: Path) -> Path:
    """Return the temporary folder of a data folder.

    The path is constant, and short enough for Ray.
    """
    root = Path(tempfile.gettempdir())
    if len(str(root)) > MAX_TEMPORARY_ROOT_CHARS:
        root = Path("/tmp")  # noqa: S108 - users of the folder create it, for its owner only
    return root / f"syncbn-{sha256(f'{os.getuid()}:{data_dir}'.encode()).hexdigest()[:10]}"


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return (
        "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        if log.exists()
        else "(no log)"
    )
