from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from service.domain.access import CredentialKind, Scope, Token, new_secret
from service.domain.jobs import JobState, Transition
from service.domain.mlflow_access import Grant
from service.domain.retries import Failures
from service.store.credentials import CredentialStore
from service.store.jobs import JobStore
from service.store.tables import credentials
from service.store.tokens import TokenStore
from tests.service.examples import make_job

HOUR = timedelta(hours=1)


@pytest.fixture
async def token(database):
    token = Token(id="token-1", owner="ann", name="t", scopes=(Scope.READ,), created_at=datetime.now(UTC))
    await TokenStore(database).add(token, new_secret(), None)
    return token


@pytest.fixture
def store(database):
    return CredentialStore(database)


async def count(database):
    async with database.read() as connection:
        return (await connection.execute(select(func.count()).select_from(credentials))).scalar_one()


async def test_a_session_leads_to_its_token_until_it_expires_or_is_deleted(store, token):
    secret = await store.add_for_token(CredentialKind.SESSION, token.id, HOUR)
    assert await store.find_token(CredentialKind.SESSION, secret) == token
    assert await store.find_token(CredentialKind.SIGN_IN, secret) is None
    assert await store.find_token(CredentialKind.SESSION, new_secret()) is None
    expired = await store.add_for_token(CredentialKind.SESSION, token.id, -HOUR)
    assert await store.find_token(CredentialKind.SESSION, expired) is None
    assert await store.delete(CredentialKind.SESSION, secret)
    assert not await store.delete(CredentialKind.SESSION, secret)
    assert await store.find_token(CredentialKind.SESSION, secret) is None


async def test_an_attempt_may_write_while_it_is_the_active_one(database, store):
    jobs, job = JobStore(database), make_job()
    await jobs.add(job)
    job = await jobs.update_fields(job, None, mlflow_run_id="run-1", mlflow_experiment_id="7")
    secret = await store.add_for_attempt(job)
    assert await store.find_grant(secret) is None  # still queued
    job = await jobs.advance(job, Transition(state=JobState.SUBMITTED, reason="test"), "test")
    assert await store.find_grant(secret) == Grant(job.id, "run-1", "7")
    assert await store.find_grant(new_secret()) is None
    await store.delete_expired()
    job = await jobs.advance(job, Transition(state=JobState.RUNNING, reason="test"), "test")
    assert await store.find_grant(secret) == Grant(job.id, "run-1", "7")
    job = await jobs.advance(
        job, Transition(state=JobState.QUEUED, reason="again", failures=Failures()), "test"
    )
    job = await jobs.advance(job, Transition(state=JobState.SUBMITTED, reason="test"), "test")
    assert await store.find_grant(secret) is None
    second = await store.add_for_attempt(job)
    assert await store.find_grant(second) == Grant(job.id, "run-1", "7")
    await jobs.advance(job, Transition(state=JobState.SUCCEEDED, reason="test"), "test")
    assert await store.find_grant(second) is None


async def test_invalid_credentials_are_deleted(database, store, token):
    jobs, job = JobStore(database), make_job()
    await jobs.add(job)
    await store.add_for_attempt(job)
    await store.add_for_token(CredentialKind.SIGN_IN, token.id, -HOUR)
    kept = await store.add_for_token(CredentialKind.SIGN_IN, token.id, HOUR)
    assert await count(database) == 3
    await store.delete_expired()
    assert await count(database) == 1
    assert await store.find_token(CredentialKind.SIGN_IN, kept) == token
