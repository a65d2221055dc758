"""SQLite connections with one thread round trip per statement.

aiosqlite makes four, which are most of the cost of a statement.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import aiosqlite


class Cursor:
    """What SQLAlchemy asks of aiosqlite's cursor; all rows are read at once."""

    arraysize = 1

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self.description: Sequence[Any] | None = None
        self.rowcount, self.lastrowid = -1, 0
        self._rows: list[Any] = []

    async def __aenter__(self) -> "Cursor":
        return self

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> "Cursor":
        """Run a statement, and read what it returns. A transaction begins with the statement after its beginning, in one way."""
        if sql.startswith("BEGIN"):
            self._connection.begin = sql
            return self
        return await self._run(lambda connection: connection.execute(sql, parameters))

    async def executemany(self, sql: str, parameters: Iterable[Sequence[Any]]) -> "Cursor":
        """Run a statement for each of several sets of parameters."""
        return await self._run(lambda connection: connection.executemany(sql, parameters))

    async def fetchall(self) -> list[Any]:
        """Return the rows."""
        rows, self._rows = self._rows, []
        return rows

    async def close(self) -> None:
        """Do nothing: SQLite's own cursor is closed already."""

    async def _run(self, statement: Callable[[sqlite3.Connection], sqlite3.Cursor]) -> "Cursor":
        begin, self._connection.begin = self._connection.begin, None
        self._connection.may_be_in_transaction |= begin is not None

        def run() -> None:
            if begin is not None:
                self._connection._conn.execute(begin)
            cursor = statement(self._connection._conn)
            self.description = cursor.description
            self._rows = cursor.fetchall() if cursor.description else []
            self.rowcount, self.lastrowid = cursor.rowcount, cursor.lastrowid or 0
            cursor.close()

        await self._connection._execute(run)  # type: ignore[no-untyped-call]
        return self


class Connection(aiosqlite.Connection):
    """One connection, in a thread of its own."""

    begin: str | None = None
    """A statement that waits for the one after it."""
    may_be_in_transaction = False
    """Set before the thread is asked to begin one: whoever is cancelled meanwhile must still roll it back."""

    async def commit(self) -> None:
        """Commit what has begun, if anything has."""
        self.begin = None
        if self.may_be_in_transaction:
            await super().commit()
            self.may_be_in_transaction = False

    async def rollback(self) -> None:
        """Roll back what has begun; where nothing has, as after reading, there is no need to ask the thread."""
        self.begin = None
        if self.may_be_in_transaction:
            await super().rollback()
            self.may_be_in_transaction = False

    def cursor(self) -> Cursor:  # type: ignore[override]  # aiosqlite's own is a coroutine that goes to the thread
        """Make a cursor."""
        return Cursor(self)


def connect(path: str, **options: Any) -> Connection:
    """Begin to connect, as `aiosqlite.connect` does."""
    connection = Connection(lambda: sqlite3.connect(path, **options), iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy has it: who has not closed its connections may end too
    return connection
