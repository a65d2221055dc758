"""SQLite connections with one thread round trip per statement.

aiosqlite makes four, which are most of the cost of a statement.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import aiosqlite


class Cursor:
    """Cursor with the interface of aiosqlite; all rows are read at once."""

    arraysize = 1

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self.description: Sequence[Any] | None = None
        self.rowcount, self.lastrowid = -1, 0
        self._rows: list[Any] = []

    async def __aenter__(self) -> "Cursor":
        return self

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> "Cursor":
        """Run a statement and fetch its rows. BEGIN is sent together with the first statement."""
        if sql.startswith("BEGIN"):
            self._connection.begin = sql
            return self
        return await self._run(lambda connection: connection.execute(sql, parameters))

    async def executemany(self, sql: str, parameters: Iterable[Sequence[Any]]) -> "Cursor":
        """Run a statement for several sets of parameters."""
        return await self._run(lambda connection: connection.executemany(sql, parameters))

    async def fetchall(self) -> list[Any]:
        """Return the rows."""
        rows, self._rows = self._rows, []
        return rows

    async def close(self) -> None:
        """No-op: the cursor of SQLite is already closed."""

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
    """Connection with its own thread."""

    begin: str | None = None
    """A statement that waits for the one after it."""
    may_be_in_transaction = False
    """Set before the thread is asked to begin one: whoever is cancelled meanwhile must still roll it back."""

    async def commit(self) -> None:
        """Commit the open transaction, if any."""
        self.begin = None
        if self.may_be_in_transaction:
            await super().commit()
            self.may_be_in_transaction = False

    async def rollback(self) -> None:
        """Roll back the open transaction, if any."""
        self.begin = None
        if self.may_be_in_transaction:
            await super().rollback()
            self.may_be_in_transaction = False

    def cursor(self) -> Cursor:  # type: ignore[override]  # aiosqlite's own is a coroutine that goes to the thread
        """Return a cursor."""
        return Cursor(self)


def connect(path: str, **options: Any) -> Connection:
    """Connect, as `aiosqlite.connect` does."""
    connection = Connection(lambda: sqlite3.connect(path, **options), iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy has it: who has not closed its connections may end too
    return connection
