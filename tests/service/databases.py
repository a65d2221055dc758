"""Databases for tests: SQLite files, and a PostgreSQL server that is started on demand."""

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from service.store.database import Database


@contextmanager
def postgresql_server() -> Iterator[str]:
    """Run a PostgreSQL server on a new data folder and yield its URL.

    Without PostgreSQL the test is skipped, or fails where CI is set.
    """
    programs = find_programs()
    if programs is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        )
    # The server refuses to run as root; other users run it themselves.
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


async def migrate(url: str) -> None:
    """Create all tables in an empty database."""
    database = Database(url, 10)
    await database.migrate()
    await database.close()


async def run_sql(url: str, *statements: str) -> None:
    """Run statements that PostgreSQL does not allow in a transaction."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


def make_template(url: str) -> None:
    """Create the tables once; `copy_template` is faster than all migrations for each test."""
    run_apart(run_sql(url, "CREATE DATABASE template"))
    run_apart(migrate(f"{url.rpartition('/')[0]}/template"))
    run_apart(migrate(url))


def run_apart(work: Coroutine[None, None, None]) -> None:
    """Run a coroutine on a separate loop, even if a loop is running."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(asyncio.run, work).result()


async def copy_template(url: str) -> str:
    """Replace the test database by a copy of the template and return its URL."""
    drop = "DROP DATABASE IF EXISTS test WITH (FORCE)"
    await run_sql(url, drop, "CREATE DATABASE test TEMPLATE template")
    return f"{url.rpartition('/')[0]}/test"


def find_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, which Debian keeps off the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None
