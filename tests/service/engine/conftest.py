"""A dispatcher whose attempts follow each other without a pause."""

from datetime import timedelta

import pytest

from tests.service.engine.replica_fixture import House


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("service.domain.lifecycle.pause", lambda failures: timedelta())


@pytest.fixture
def house(database, tmp_path):
    return House(database, tmp_path)
