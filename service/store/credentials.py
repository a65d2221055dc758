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
    """Queries about sign-in links, sessions and the credentials of attempts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_for_token(self, kind: CredentialKind, token_id: str, lifetime: timedelta) -> str:
        """Store a new sign-in link or session of a token, and return its secret."""
        return await self._add(kind, token_id=token_id, expires_at=datetime.now(UTC) + lifetime)

    async def add_for_attempt(self, job: Job) -> str:
        """Store a new credential for the job's present attempt, and return its secret. It is valid while the attempt is active.

        Those of its earlier attempts are deleted.
        """
        earlier = delete(credentials).where(credentials.c.job_id == job.id, credentials.c.attempt < job.attempt)
        async with self._database.write() as connection:
            await connection.execute(earlier)
        return await self._add(CredentialKind.ATTEMPT, job_id=job.id, attempt=job.attempt)

    async def _add(self, kind: CredentialKind, **values: object) -> str:
        secret = new_secret()
        async with self._database.write() as connection:
            await connection.execute(insert(credentials).values(hash=hash_secret(secret), kind=kind.value, **values))
        return secret

    async def find_token(self, kind: CredentialKind, secret: str) -> Token | None:
        """Find the token behind a sign-in link or session that has not expired."""
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
        """Delete a credential; return whether it was there, which is true for one caller only."""
        query = delete(credentials).where(credentials.c.hash == hash_secret(secret), credentials.c.kind == kind.value)
        async with self._database.write() as connection:
            return (await connection.execute(query)).rowcount == 1

    async def find_grant(self, secret: str) -> Grant | None:
        """Find what an attempt may write to; None once it is not its job's active attempt any more."""
        query = (
            select(jobs.c.id, jobs.c.mlflow_run_id, jobs.c.mlflow_experiment_id)
            .join(credentials, and_(credentials.c.job_id == jobs.c.id, credentials.c.attempt == jobs.c.attempt))
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
        """Count bytes that an attempt uploads; return False, and count nothing, if they would be more than `max_bytes` in all."""
        counted = credentials.c.uploaded_bytes + number
        query = (
            update(credentials)
            .where(credentials.c.hash == hash_secret(secret), counted <= max_bytes)
            .values(uploaded_bytes=counted)
        )
        async with self._database.write() as connection:
            return (await connection.execute(query)).rowcount == 1

    async def delete_expired(self) -> None:
        """Delete what opens nothing any more."""
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
