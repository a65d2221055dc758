"""Fixtures of the tests of the store."""

import pytest

from service.store.audit import AuditStore
from service.store.jobs import JobStore
from service.store.tokens import TokenStore


@pytest.fixture
def jobs(database):
    return JobStore(database)


@pytest.fixture
def tokens(database):
    return TokenStore(database)


@pytest.fixture
def audit(database):
    return AuditStore(database)
