"""Database connections, transactions and migrations.

SQLite with a write-ahead log, or PostgreSQL.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import randbelow
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import aiosqlite
from alembic import command
from alembic.config import Config
from sqlalchemy import Column, Connection, Row, Select, Table, event, func, make_url, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from service.domain.errors import StorageFull, UpstreamUnavailable
from service.domain.leases import SCHEDULER
from service.store.tables import leases

MIGRATIONS = Path(__file__).parent / "migrations"
TROUBLED_CLASSES = ("08", "53", "57", "58")
"""SQLSTATE classes of temporary errors: connection, resources, operator intervention, system."""
CONFLICTS = ("40001", "40P01")
"""SQLSTATEs of a serialization failure and a deadlock, which a retry may avoid."""
DISK_FULL = "53100"
"""SQLSTATE of a full disk."""
MIGRATION_LOCK = 5_021_503
"""Advisory lock of migrations."""
CONNECTIONS = 20
"""Number of connections, which stay open: opening one takes longer than most statements."""
POSTGRESQL_SETTINGS = {"plan_cache_mode": "force_custom_plan"}
"""Settings of a session: plans cached while there were few jobs would read all of many jobs."""
CLOSE_SECONDS = 5.0
"""Time for the last statements of closed connections."""
WRITES = "writes"
"""Execution option of connections that write."""


async def _nothing() -> None:
    return


@dataclass
class Transaction:
    """Transaction of several reads and writes of a task.

    It begins with the first write.
    """

    resources: AsyncExitStack
    first: Callable[[], Awaitable[object]]
    connection: AsyncConnection | None = None
    after_commit: list[Callable[[], None]] = field(default_factory=list)


class Database:
    """Database at `url`. Waits beyond `timeout_seconds` raise UpstreamUnavailable."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._threads: WeakSet[Thread] = WeakSet()
        """Threads of SQLite's connections."""
        self._engine = _open(url, timeout_seconds, self._threads)
        self._timeout_seconds = timeout_seconds
        is_sqlite = self._engine.dialect.name == "sqlite"
        # A read needs no transaction, each statement sees one state: on PostgreSQL it would cost two more
        # messages.
        self._reader = (
            self._engine if is_sqlite else self._engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        self._writing = self._engine.execution_options(**{WRITES: True})
        # SQLite has one writer. Those who wait for it inside SQLite look again and again, without an order,
        # and some never get it.
        self._writer = asyncio.Lock() if is_sqlite else None
        # By task, so that other tasks do not write into the transaction.
        self._transactions: WeakKeyDictionary[asyncio.Task[Any], Transaction] = WeakKeyDictionary()

    @asynccontextmanager
    async def transaction(self, first: Callable[[], Awaitable[object]] = _nothing) -> AsyncIterator[None]:
        """Join the writes of this task in one transaction.

        Reads after the first write are part of it. It is committed at the end and rolled back on an error. It
        starts at the first write, or with `first` in it, so that requests to others before anything is
        stored, such as name resolution, keep no writer waiting. Raises UpstreamUnavailable.
        """
        task = asyncio.current_task()
        assert task is not None
        assert task not in self._transactions, "transactions are not nested"
        async with AsyncExitStack() as resources:
            self._transactions[task] = transaction = Transaction(resources, first)
            try:
                yield
            finally:
                del self._transactions[task]
            if transaction.connection is not None:
                with _unavailable():
                    await transaction.connection.commit()
        for call in transaction.after_commit:
            call()

    def after_commit(self, call: Callable[[], None]) -> None:
        """Call a function after the commit of this task's transaction, or now without one."""
        if (transaction := self._joined()) is None:
            call()
        else:
            transaction.after_commit.append(call)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for queries. Raises UpstreamUnavailable."""
        if (transaction := self._joined()) is not None and transaction.connection is not None:
            with _unavailable():
                yield transaction.connection
            return
        with _unavailable():
            async with self._reader.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection for one transaction. Raises UpstreamUnavailable.

        Inside `transaction()` it is that one, and so is what an error rolls back: it must be let through.
        """
        if (transaction := self._joined()) is not None:
            joined = transaction.connection or await self._begin(transaction)
            with _unavailable():
                yield joined
            return
        with _unavailable():
            async with self._connect_to_write() as connection, connection.begin():
                yield connection

    async def _begin(self, transaction: Transaction) -> AsyncConnection:
        # Errors of the database are converted where they occur, since other work in the block has errors of
        # its own.
        with _unavailable():
            connection = await transaction.resources.enter_async_context(self._connect_to_write())
            await connection.begin()
        transaction.connection = connection
        await transaction.first()
        return connection

    @asynccontextmanager
    async def _connect_to_write(self) -> AsyncIterator[AsyncConnection]:
        """Connect, one writer at a time."""
        async with AsyncExitStack() as stack:
            if self._writer is not None:
                try:
                    async with asyncio.timeout(self._timeout_seconds):
                        await stack.enter_async_context(self._writer)
                except TimeoutError:
                    raise UpstreamUnavailable(
                        "the database did not answer: others have written to it all the time"
                    ) from None
            yield await stack.enter_async_context(self._writing.connect())

    def _joined(self) -> Transaction | None:
        task = asyncio.current_task()
        return None if task is None else self._transactions.get(task)

    async def migrate(self) -> None:
        """Migrate the tables to the newest version in one transaction."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")

        def upgrade(connection: Connection) -> None:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

        async with self.write() as connection:
            await advisory_lock(connection, MIGRATION_LOCK)  # replicas may start together
            await connection.run_sync(upgrade)

    async def check(self) -> None:
        """Check the database by writing and reading. Raises UpstreamUnavailable."""
        async with self.write() as connection:
            if connection.dialect.name == "sqlite":  # which does not write a row that does not change
                await connection.exec_driver_sql(f"PRAGMA user_version={randbelow(2**31)}")
            one = leases.c.name == SCHEDULER
            await connection.execute(update(leases).where(one).values(token=leases.c.token))
        async with self.read() as connection:
            await connection.execute(select(leases.c.token).where(one))

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()
        # A statement whose task was cancelled answers to the event loop, which must not be closed before.
        await asyncio.to_thread(self._join_threads)

    def _join_threads(self) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in list(self._threads):
            if thread.is_alive():
                thread.join(max(deadline - time.monotonic(), 0))


async def advisory_lock(connection: AsyncConnection, lock: int) -> None:
    """Serialise transactions with the same `lock` number; on SQLite all writers are."""
    if connection.dialect.name == "postgresql":
        await connection.execute(select(func.pg_advisory_xact_lock(lock)))


def upsert(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite_dialect.Insert:
    """Return an INSERT with ON CONFLICT support for either database."""
    return (postgresql.insert if connection.dialect.name == "postgresql" else sqlite_dialect.insert)(table)


@contextmanager
def _unavailable() -> Iterator[None]:
    """Convert errors of the database; our own mistakes pass unchanged."""
    try:
        yield
    except (DBAPIError, PoolTimeoutError, OSError) as error:
        if isinstance(error, DBAPIError) and not _is_of_the_server(error):
            raise
        if "database or disk is full" in str(error) or _sqlstate(error) == DISK_FULL:
            raise StorageFull("the database has no space left on its disk") from error
        raise UpstreamUnavailable(
            f"the database did not answer: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _is_of_the_server(error: DBAPIError) -> bool:
    """Return whether an error means an unavailable database or a conflict to retry."""
    state = _sqlstate(error)
    return (
        error.connection_invalidated
        or isinstance(error, OperationalError | InterfaceError)
        or state[:2] in TROUBLED_CLASSES
        or state in CONFLICTS
    )


def _sqlstate(error: Exception) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")


def _open(url: str, timeout_seconds: float, threads: "WeakSet[Thread]") -> AsyncEngine:
    address = make_url(url)
    if address.get_backend_name() != "sqlite":
        engine = create_async_engine(
            address,
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=timeout_seconds,
            connect_args={
                "timeout": timeout_seconds,
                "command_timeout": timeout_seconds,
                "server_settings": POSTGRESQL_SETTINGS,
            },
        )

        @event.listens_for(engine.sync_engine, "checkout")
        def check(connection: Any, *_: Any) -> None:
            # After a restart of the server a connection knows that it is closed: to ask the server costs each
            # use three messages.
            if connection.driver_connection.is_closed():
                raise DisconnectionError

        return engine
    if address.database and address.database != ":memory:":
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        address,
        connect_args={"timeout": timeout_seconds},
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_timeout=timeout_seconds,
    )

    def create(*arguments: Any, **options: Any) -> aiosqlite.Connection:
        connection = aiosqlite.connect(*arguments, **options)
        connection._thread.daemon = True  # as SQLAlchemy sets it
        threads.add(connection._thread)  # before it is opened, which may be cancelled
        return connection

    @event.listens_for(engine.sync_engine, "do_connect")
    def use_create(_dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
        options["async_creator_fn"] = create

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # Python's driver would otherwise begin a transaction only before some statements, and so not make
        # migrations whole.
        connection.isolation_level = None
        cursor = connection.cursor()
        # With a write-ahead log, readers and the one writer do not block each other.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "invalidate")
    def roll_back(connection: Any, *_: Any) -> None:
        # Where an INSERT with RETURNING is cancelled, its transaction and lock outlive the connection's
        # close.
        connection.rollback()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # Who reads first and then writes would be refused at once if another has written in between: writers
        # wait at the beginning. A read needs no transaction: each statement sees one state, as on PostgreSQL.
        if connection.get_execution_options().get(WRITES):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


async def read_page(
    connection: AsyncConnection, query: Select[Any], sequence: Column[int], size: int, before: int | None
) -> tuple[list[Row[Any]], int | None]:
    """Return up to `size` rows before a place, and the place of the next page."""
    query = query.add_columns(sequence.label("place")).order_by(sequence.desc()).limit(size + 1)
    if before is not None:
        query = query.where(sequence < before)
    rows = list((await connection.execute(query)).all())
    return rows[:size], rows[size - 1].place if len(rows) > size else None
