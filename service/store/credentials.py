"""Credentials in the database, stored as hashes of their secrets."""

from dataclasses import fields
from datetime import UTC, datetime, timedelta

from sqlalchemy import and_, delete, exists, insert, or_, select, update

from service.domain.access import CredentialKind, Token, hash_secret, new_secret
from service.domain.jobs import ACTIVE_STATES, Job
from service.domain.mlflow_access import Grant
from service.store.database import Database
from service.store.tables import credentials, jobs, tokens
from service.store.tokens import read_token

TOKEN_COLUMNS = [tokens.c[field.name] for field in fields(Token)]


class CredentialStore:
    """Sign-in links, sessions and credentials of attempts in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_for_token(self, kind: CredentialKind, token_id: str, lifetime: timedelta) -> str:
        """Create a sign-in link or session of a token, and return its secret."""
        return await self._add(kind, token_id=token_id, expires_at=datetime.now(UTC) + lifetime)

    async def add_for_attempt(self, job: Job) -> str:
        """Create a credential of the current attempt, valid while it is active.

        Returns its secret.

        Those of its earlier attempts are deleted.
        """
        earlier = delete(credentials).where(
            credentials.c.job_id == job.id, credentials.c.attempt < job.attempt
        )
        async with self._database.write() as connection:
            await connection.execute(earlier)
        return await self._add(CredentialKind.ATTEMPT, job_id=job.id, attempt=job.attempt)

    async def _add(self, kind: CredentialKind, **values: object) -> str:
        secret = new_secret()
        async with self._database.write() as connection:
            await connection.execute(
                insert(credentials).values(hash=hash_secret(secret), kind=kind.value, **values)
            )
        return secret

    async def find_token(self, kind: CredentialKind, secret: str) -> Token | None:
        """Return the token of a valid sign-in link or session."""
        query = (
            select(*TOKEN_COLUMNS)
            .join(credentials, credentials.c.token_id == tokens.c.id)
            .where(
                credentials.c.hash == hash_secret(secret),
                credentials.c.kind == kind.value,
                credentials.c.expires_at > datetime.now(UTC),
            )
        )
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else read_token(row)

    async def delete(self, kind: CredentialKind, secret: str) -> bool:
        """Delete a credential.

        Returns whether it existed, which is true for one caller only.
        """
        query = delete(credentials).where(
            credentials.c.hash == hash_secret(secret), credentials.c.kind == kind.value
        )
        async with self._database.write() as connection:
            return (await connection.execute(query)).rowcount == 1

    async def find_grant(self, secret: str) -> Grant | None:
        """Return the grant of an attempt; None if it is no longer the active attempt."""
        query = (
            select(jobs.c.id, jobs.c.mlflow_run_id, jobs.c.mlflow_experiment_id)
            .join(
                credentials, and_(credentials.c.job_id == jobs.c.id, credentials.c.attempt == jobs.c.attempt)
            )
            .where(
                credentials.c.hash == hash_secret(secret),
                credentials.c.kind == CredentialKind.ATTEMPT.value,
                jobs.c.state.in_([state.value for state in ACTIVE_STATES]),
                jobs.c.mlflow_run_id.is_not(None),
            )
        )
        async with self._database.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return None if row is None else Grant(*row)

    async def count_upload(self, secret: str, number: int, max_bytes: int) -> bool:
        """Count uploaded bytes of an attempt.

        Returns False without counting beyond `max_bytes`.
        """
        # One statement checks and counts, so that concurrent uploads cannot exceed the limit together.
        counted = credentials.c.uploaded_bytes + number
        query = (
            update(credentials)
            .where(credentials.c.hash == hash_secret(secret), counted <= max_bytes)
            .values(uploaded_bytes=counted)
        )
        async with self._database.write() as connection:
            return (await connection.execute(query)).rowcount == 1

    async def delete_expired(self) -> None:
        """Delete expired credentials."""
        is_active = exists().where(
            jobs.c.id == credentials.c.job_id,
            jobs.c.attempt == credentials.c.attempt,
            jobs.c.state.in_([state.value for state in ACTIVE_STATES]),
        )
        query = delete(credentials).where(
            or_(
                credentials.c.expires_at <= datetime.now(UTC),
                and_(credentials.c.kind == CredentialKind.ATTEMPT.value, ~is_active),
            )
        )
        async with self._database.write() as connection:
            await connection.execute(query)
