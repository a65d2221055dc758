import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text

from service.domain.access import Caller, Scope, Token, hash_secret
from service.domain.errors import Conflict, NotFound
from service.domain.jobs import new_id
from service.store.audit import AuditStore
from service.store.tables import tokens as table
from service.store.tokens import TokenStore

ANN = Caller("ann", (Scope.ADMIN,), "token-of-ann")


@pytest.fixture
def tokens(database):
    return TokenStore(database)


@pytest.fixture
def audit(database):
    return AuditStore(database)


def make_token(**changes):
    values = {"id": new_id("token"), "owner": "ann", "name": "laptop", "scopes": (Scope.SUBMIT,)}
    return Token(**(values | {"created_at": datetime.now(UTC)} | changes))


async def test_a_token_is_found_by_its_secret_which_is_stored_nowhere(database, tokens):
    token = make_token(expires_at=datetime.now(UTC) + timedelta(days=1))
    await tokens.add(token, "the secret", ANN)
    assert await tokens.find("the secret") == token
    assert await tokens.find("another") is None
    async with database.read() as connection:
        row = (await connection.execute(select(table))).one()
    assert row.hash == hash_secret("the secret")
    assert "the secret" not in str(row)


async def test_its_use_is_noted_once_a_minute(tokens):
    await tokens.add(make_token(), "secret", ANN)
    await tokens.note_use(await tokens.find("secret"))
    used = await tokens.find("secret")
    assert datetime.now(UTC) - used.last_used_at < timedelta(seconds=5)
    await tokens.note_use(used)
    await tokens.note_use(make_token(id=used.id))  # as read before the first note
    assert await tokens.find("secret") == used


async def test_revoking_is_final_and_on_the_record(tokens, audit):
    token = make_token()
    await tokens.add(token, "secret", None)
    revoked = await tokens.revoke(token.id, ANN)
    assert not revoked.is_valid(datetime.now(UTC))
    assert await tokens.revoke(token.id, ANN) == revoked == await tokens.find("secret")
    records, more = await audit.page(10, None)
    assert more is None
    assert [(r.actor, r.token_id, r.action, r.subject) for r in records] == [
        ("ann", "token-of-ann", "token.revoke", token.id),
        ("service", None, "token.create", token.id),
    ]
    with pytest.raises(NotFound, match="token-0"):
        await tokens.revoke("token-0", ANN)


async def test_what_is_revoked_with_other_changes_opens_nothing_once_they_are_stored(database, tokens):
    token = make_token()
    await tokens.add(token, "secret", ANN)
    async with database.transaction():
        await tokens.revoke(token.id, ANN)
        # A request of somebody else, who reads what is stored.
        assert (await asyncio.create_task(tokens.find("secret"))).is_valid(datetime.now(UTC))
    assert not (await tokens.find("secret")).is_valid(datetime.now(UTC))


async def test_what_another_replica_has_revoked_opens_nothing_a_second_later(database, tokens):
    token = make_token()
    await tokens.add(token, "secret", ANN)
    assert (await tokens.find("secret")).is_valid(datetime.now(UTC))
    await TokenStore(database).revoke(token.id, ANN)
    await asyncio.sleep(1.1)
    assert not (await tokens.find("secret")).is_valid(datetime.now(UTC))


async def test_the_last_valid_admin_stays(tokens):
    first, second = make_token(scopes=(Scope.ADMIN,)), make_token(scopes=(Scope.ADMIN,))
    expired = make_token(scopes=(Scope.ADMIN,), expires_at=datetime.now(UTC) - timedelta(seconds=1))
    for token in (first, second, expired, make_token()):
        await tokens.add(token, token.id, ANN)
    results = await asyncio.gather(*[tokens.revoke(token.id, ANN) for token in (first, second)], return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 1
    await tokens.revoke(expired.id, ANN)


async def test_many_that_start_together_make_one_admin(tokens):
    shown = []
    await asyncio.gather(*[tokens.ensure_admin(None, shown.append) for _ in range(6)])
    assert len(shown) == 1
    token = await tokens.find(shown[0])
    assert (token.owner, token.scopes) == ("admin", (Scope.ADMIN,))
    await tokens.ensure_admin(None, shown.append)
    assert len(shown) == len((await tokens.page(10, None))[0]) == 1


async def test_a_given_secret_opens_once_and_again_only_if_it_was_not_revoked(tokens):
    shown = []
    await tokens.ensure_admin(None, shown.append)
    await asyncio.gather(*[tokens.ensure_admin("given by the operator", shown.append) for _ in range(6)])
    assert len(shown) == 1
    assert len((await tokens.page(10, None))[0]) == 2
    given = await tokens.find("given by the operator")
    await tokens.revoke(given.id, ANN)
    await tokens.ensure_admin("given by the operator", shown.append)
    assert not (await tokens.find("given by the operator")).is_valid(datetime.now(UTC))


async def test_a_secret_that_cannot_be_shown_is_not_stored(tokens):
    def broken(_):
        raise OSError("no standard output")

    with pytest.raises(Exception, match="no standard output"):
        await tokens.ensure_admin(None, broken)
    assert (await tokens.page(10, None))[0] == []


async def test_pages(tokens, audit):
    made = [make_token() for _ in range(5)]
    for token in made:
        await tokens.add(token, token.id, ANN)
    for read, expected in [
        (tokens.page, [token.id for token in made[::-1]]),
        (audit.page, [token.id for token in made[::-1]]),
    ]:
        seen, place = [], None
        while True:
            page, place = await read(2, place)
            seen += [getattr(item, "subject", None) or item.id for item in page]
            if place is None:
                break
        assert seen == expected


async def test_what_was_there_before_belongs_to_the_admin(tmp_path):
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
