"""Tokens in the database."""

from collections.abc import Callable, Collection
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from cachetools import TTLCache
from sqlalchemy import bindparam, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.domain.access import Caller, Scope, Token, hash_secret, new_secret
from service.domain.errors import Conflict, NotFound
from service.domain.jobs import ADMIN, new_id
from service.store.audit import record
from service.store.database import Database, advisory_lock, read_page
from service.store.tables import tokens

COLUMNS = [tokens.c[field.name] for field in fields(Token)]
BY_HASH = select(*COLUMNS).where(tokens.c.hash == bindparam("hash"))
"""Statement, compiled once: compiling takes about as long as running it."""
MAX_CACHED_TOKENS, TOKEN_CACHE_SECONDS = 10_000, 1
"""Size and lifetime of the cache of tokens, since most requests use a token that was just used."""
ADMINS_LOCK = 5_021_504
"""Advisory lock of changes to the set of admins."""
BETWEEN_NOTES = timedelta(minutes=1)
"""Minimum time between two updates of a token's last use."""


class TokenStore:
    """Tokens in the database, found by the hash of their secret."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: TTLCache[str, Token] = TTLCache(MAX_CACHED_TOKENS, TOKEN_CACHE_SECONDS)
        """Cached tokens by the hash of their secret."""
        self._changes = 0
        """Number of changes of tokens made by this process."""

    async def add(self, token: Token, secret: str, maker: Caller | None) -> None:
        """Create a token; without an actor it is the service."""
        async with self._database.write() as connection:
            await _add(connection, token, secret, maker)

    async def find(self, secret: str) -> Token | None:
        """Return the token of a secret, valid or not.

        A revocation elsewhere is seen within a second.

        The duration of the comparison of hashes leaks nothing: the hash cannot be chosen without the secret.
        """
        hashed = hash_secret(secret)
        if (known := self._known.get(hashed)) is not None:
            return known
        # Read before the query, to detect a revocation in this process while it runs.
        changes = self._changes
        async with self._database.read() as connection:
            row = (await connection.execute(BY_HASH, {"hash": hashed})).one_or_none()
        if row is None:
            return None
        token = read_token(row)
        if self._changes == changes:  # what was read before a change may be old
            self._known[hashed] = token
        return token

    async def valid_among(self, token_ids: Collection[str]) -> set[str]:
        """Return which of these tokens are still valid."""
        query = select(tokens.c.id).where(
            tokens.c.id.in_(token_ids),
            tokens.c.revoked_at.is_(None),
            or_(tokens.c.expires_at.is_(None), tokens.c.expires_at > datetime.now(UTC)),
        )
        async with self._database.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def note_use(self, token: Token) -> None:
        """Store the time of last use, to the minute."""
        now = datetime.now(UTC)
        if token.last_used_at is not None and now - token.last_used_at < BETWEEN_NOTES:
            return
        # The condition is repeated in SQL, since cached tokens of several replicas are not current.
        query = update(tokens).where(
            tokens.c.id == token.id,
            or_(tokens.c.last_used_at.is_(None), tokens.c.last_used_at <= now - BETWEEN_NOTES),
        )
        async with self._database.write() as connection:
            await connection.execute(query.values(last_used_at=now))
        self._database.after_commit(self._forget)

    async def page(self, size: int, before: int | None) -> tuple[list[Token], int | None]:
        """Return a page of tokens, newest first, and the place of the next page."""
        async with self._database.read() as connection:
            rows, more = await read_page(connection, select(*COLUMNS), tokens.c.sequence, size, before)
        return [read_token(row) for row in rows], more

    async def revoke(self, token_id: str, actor: Caller) -> Token:
        """Revoke a token; idempotent.

        Raises NotFound, and Conflict for the last valid token of an admin, after which nobody could make
        another one.
        """
        now = datetime.now(UTC)
        async with self._database.write() as connection:
            await advisory_lock(connection, ADMINS_LOCK)
            rows = (await connection.execute(select(*COLUMNS).where(tokens.c.revoked_at.is_(None)))).all()
            live = {row.id: read_token(row) for row in rows}
            token = live.pop(token_id, None)
            if token is None:
                row = (
                    await connection.execute(select(*COLUMNS).where(tokens.c.id == token_id))
                ).one_or_none()
                if row is None:
                    raise NotFound(f"there is no token {token_id!r}")
                return read_token(row)
            is_admin = Scope.ADMIN in token.scopes and token.is_valid(now)
            if is_admin and not any(
                Scope.ADMIN in other.scopes and other.is_valid(now) for other in live.values()
            ):
                raise Conflict(
                    f"token {token_id} is the last valid one with scope admin; make another one before"
                )
            await connection.execute(update(tokens).where(tokens.c.id == token_id).values(revoked_at=now))
            await _record(connection, actor, "token.revoke", token, now)
            row = (await connection.execute(select(*COLUMNS).where(tokens.c.id == token_id))).one()
        self._database.after_commit(self._forget)
        return read_token(row)

    def _forget(self) -> None:
        self._known.clear()
        self._changes += 1

    async def ensure_admin(self, given: str | None, show: Callable[[str], None]) -> None:
        """Ensure an admin token: with the given secret, or a new one if no token exists.

        A given one that is known is left as it is, revoked or not. A new secret is handed to `show` before it
        is stored: a crash in between leaves a useless secret, not a closed service.
        """
        async with self._database.write() as connection:
            await advisory_lock(connection, ADMINS_LOCK)
            if given is not None:
                await _add_unknown(connection, _operators("SYNCBN_TOKEN", Scope.ADMIN), given)
            elif not (await connection.execute(select(func.count()).select_from(tokens))).scalar_one():
                secret = new_secret()
                show(secret)
                await _add(connection, _operators("made at the first start", Scope.ADMIN), secret, None)

    async def ensure_metrics(self, given: str) -> None:
        """Ensure a token with the given secret; a new one opens `/metrics` alone."""
        async with self._database.write() as connection:
            await advisory_lock(connection, ADMINS_LOCK)
            await _add_unknown(connection, _operators("SYNCBN_METRICS_TOKEN", Scope.METRICS), given)


async def _add_unknown(connection: AsyncConnection, token: Token, secret: str) -> None:
    known = select(tokens.c.id).where(tokens.c.hash == hash_secret(secret))
    if (await connection.execute(known)).one_or_none() is None:
        await _add(connection, token, secret, None)


async def _add(connection: AsyncConnection, token: Token, secret: str, maker: Caller | None) -> None:
    row = asdict(token) | {"scopes": [scope.value for scope in token.scopes], "hash": hash_secret(secret)}
    await connection.execute(insert(tokens).values(**row))
    await _record(connection, maker, "token.create", token, token.created_at)


async def _record(
    connection: AsyncConnection, actor: Caller | None, action: str, token: Token, at: datetime
) -> None:
    await record(connection, actor, action, token.id, f"of {token.owner}, with {', '.join(token.scopes)}", at)


def _operators(name: str, scope: Scope) -> Token:
    return Token(id=new_id("token"), owner=ADMIN, name=name, scopes=(scope,), created_at=datetime.now(UTC))


def read_token(row: Any) -> Token:
    """Convert a row to a token."""
    values = {field.name: getattr(row, field.name) for field in fields(Token)}
    return Token(**(values | {"scopes": tuple(Scope(scope) for scope in row.scopes)}))
