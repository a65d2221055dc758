"""Dispatcher without delays between attempts."""

from datetime import timedelta

import pytest


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("service.domain.lifecycle.pause", lambda failures: timedelta())
