import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text

from service.domain.access import Scope, hash_secret
from service.domain.errors import Conflict
from service.store.tables import tokens as table
from service.store.tokens import TokenStore
from tests.service.store.token_fixtures import ANN, make_token


async def test_a_token_is_found_by_its_secret_which_is_stored_nowhere(database, tokens):
    token = make_token(expires_at=datetime.now(UTC) + timedelta(days=1))
    await tokens.add(token, "the secret", ANN)
    assert await tokens.find("the secret") == token
    assert await tokens.find("another") is None
    async with database.read() as connection:
        row = (await connection.execute(select(table))).one()
    assert row.hash == hash_secret("the secret")
    assert "the secret" not in str(row)


async def test_the_last_use_of_a_token_is_stored_once_a_minute(tokens):
    await tokens.add(make_token(), "secret", ANN)
    await tokens.note_use(await tokens.find("secret"))
    used = await tokens.find("secret")
    assert datetime.now(UTC) - used.last_used_at < timedelta(seconds=5)
    await tokens.note_use(used)
    await tokens.note_use(make_token(id=used.id))  # as read before the first update
    assert await tokens.find("secret") == used


async def test_a_token_revoked_in_a_transaction_is_invalid_after_its_commit(database, tokens):
    token = make_token()
    await tokens.add(token, "secret", ANN)
    async with database.transaction():
        await tokens.revoke(token.id, ANN)
        # A request of another client, which reads stored tokens.
        assert (await asyncio.create_task(tokens.find("secret"))).is_valid(datetime.now(UTC))
    assert not (await tokens.find("secret")).is_valid(datetime.now(UTC))


async def test_a_token_revoked_by_another_replica_is_invalid_after_a_second(database, tokens):
    token = make_token()
    await tokens.add(token, "secret", ANN)
    assert (await tokens.find("secret")).is_valid(datetime.now(UTC))
    await TokenStore(database).revoke(token.id, ANN)
    await asyncio.sleep(1.1)
    assert not (await tokens.find("secret")).is_valid(datetime.now(UTC))


async def test_the_last_valid_admin_token_is_kept(tokens):
    first, second = make_token(scopes=(Scope.ADMIN,)), make_token(scopes=(Scope.ADMIN,))
    expired = make_token(scopes=(Scope.ADMIN,), expires_at=datetime.now(UTC) - timedelta(seconds=1))
    for token in (first, second, expired, make_token()):
        await tokens.add(token, token.id, ANN)
    results = await asyncio.gather(
        *[tokens.revoke(token.id, ANN) for token in (first, second)], return_exceptions=True
    )
    assert sum(isinstance(result, Conflict) for result in results) == 1
    await tokens.revoke(expired.id, ANN)


async def test_replicas_that_start_together_create_one_admin(tokens):
    shown = []
    await asyncio.gather(*[tokens.ensure_admin(None, shown.append) for _ in range(6)])
    assert len(shown) == 1
    token = await tokens.find(shown[0])
    assert (token.owner, token.scopes) == ("admin", (Scope.ADMIN,))
    await tokens.ensure_admin(None, shown.append)
    assert len(shown) == len((await tokens.page(10, None))[0]) == 1


async def test_a_configured_secret_stays_revoked(tokens):
    shown = []
    await tokens.ensure_admin(None, shown.append)
    await asyncio.gather(*[tokens.ensure_admin("given by the operator", shown.append) for _ in range(6)])
    assert len(shown) == 1
    assert len((await tokens.page(10, None))[0]) == 2
    given = await tokens.find("given by the operator")
    await tokens.revoke(given.id, ANN)
    await tokens.ensure_admin("given by the operator", shown.append)
    assert not (await tokens.find("given by the operator")).is_valid(datetime.now(UTC))


async def test_a_configured_metrics_token_opens_metrics_alone(tokens):
    await asyncio.gather(*[tokens.ensure_metrics("for prometheus alone") for _ in range(6)])
    token = await tokens.find("for prometheus alone")
    assert token.scopes == (Scope.METRICS,)
    await tokens.revoke(token.id, ANN)  # it is not the last admin token
    await tokens.ensure_metrics("for prometheus alone")
    assert not (await tokens.find("for prometheus alone")).is_valid(datetime.now(UTC))


async def test_a_secret_that_cannot_be_shown_is_not_stored(tokens):
    def broken(_):
        raise OSError("no standard output")

    with pytest.raises(Exception, match="no standard output"):
        await tokens.ensure_admin(None, broken)
    assert (await tokens.page(10, None))[0] == []


async def test_lists_are_paginated(tokens, audit):
    made = [make_token() for _ in range(5)]
    for token in made:
        await tokens.add(token, token.id, ANN)
    for read, expected in [
        (tokens.page, [token.id for token in made[::-1]]),
        (audit.page, [token.id for token in made[::-1]]),
    ]:
        seen, position = [], None
        while True:
            page, position = await read(2, position)
            seen += [getattr(item, "subject", None) or item.id for item in page]
            if position is None:
                break
        assert seen == expected


async def test_the_migration_assigns_earlier_jobs_to_the_admin(tmp_path):
    from alembic import command
    from alembic.config import Config

    from service.store.comparisons import ComparisonStore
    from service.store.database import MIGRATIONS, Database

    database = Database(f"sqlite+aiosqlite:///{tmp_path}/old.db", 5)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")

    def upgrade(connection):
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")

    async with database.write() as connection:
        await connection.run_sync(upgrade)
        await connection.execute(
            text(
                "INSERT INTO comparisons (id, name, matrix, baseline, metric, created_at) "
                "VALUES ('comparison-1', 'old', '{}', '{}', 'accuracy', '2026-01-01')"
            )
        )
    await database.migrate()
    assert (await ComparisonStore(database).get("comparison-1")).owner == "admin"
    await database.close()
