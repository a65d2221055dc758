"""Databases for tests: a SQLite file, and a PostgreSQL server that is started for them."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from service.store.database import Database


@contextmanager
def postgresql_server() -> Iterator[str]:
    """Run a PostgreSQL server on a new data folder and yield its address.

    Without PostgreSQL the test is skipped, or fails where CI is set.
    """
    programs = find_programs()
    if programs is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        )
    # The server refuses to run as root; whoever else runs the tests runs it too.
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg") as folder, socket.socket() as probe:
        if user:
            shutil.chown(folder, user)
        Path(folder).chmod(0o700)
        data = f"{folder}/data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "test", "--auth=trust", "--no-sync"],
            check=True, capture_output=True, timeout=120, user=user, cwd=folder,
        )  # fmt: skip
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        control = [programs / "pg_ctl", "-D", data, "-w", "-t", "60"]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        subprocess.run(
            [*control, "-l", f"{folder}/log", "-o", options, "start"],
            check=True, capture_output=True, timeout=90, user=user, cwd=folder,
        )  # fmt: skip
        try:
            yield f"postgresql+asyncpg://test@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run(
                [*control, "-m", "immediate", "stop"],
                check=True,
                timeout=90,
                user=user,
                cwd=folder,
                capture_output=True,
            )


async def empty(url: str) -> None:
    """Drop all that is in a PostgreSQL database."""
    database = Database(url, 10)
    async with database.write() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await database.close()


def find_programs() -> Path | None:
    """Find the folder of PostgreSQL's programs, which Debian keeps off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None
