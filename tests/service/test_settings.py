"""Settings from environment variables."""

from datetime import timedelta

import pytest
from pydantic import ValidationError

from service.domain.scheduling import Quota
from service.settings import Settings


def test_quotas_can_be_set_per_owner(monkeypatch):
    monkeypatch.setenv("SYNCBN_QUOTA_JOBS", "2")
    monkeypatch.setenv("SYNCBN_QUOTA_PRIORITY", "0")
    monkeypatch.setenv("SYNCBN_OWNER_QUOTAS", '{"ann": {"jobs": 4, "gpus": 8.0}, "bob": {"priority": 10}}')
    policy = Settings().policy()
    assert policy.quota_of("eve") == Quota(jobs=2, priority=0)
    assert policy.quota_of("ann") == Quota(jobs=4, gpus=8, priority=0)
    assert policy.quota_of("bob") == Quota(priority=10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("owner_quotas", '{"ann": {"jobs": -1}}'),
        ("owner_quotas", '{"ann": {"disks": 1}}'),
        ("owner_quotas", '{"ann": {"priority": -1}}'),  # below the default of submissions
        ("owner_quotas", '{"Two Words": {"jobs": 1}}'),
        ("webhook_networks", "10.0.0.0/8, somewhere"),
        ("webhook_networks", "10.0.0.1/8"),
        ("retention_days", "0"),
        ("log_format", "xml"),
        ("allowed_imports", "torchvision"),
        ("allowed_imports", "models:build, os:"),
        ("host", "0.0.0.0"),  # browsers cannot open this address
        ("trusted_proxies", "nowhere"),
        ("trusted_proxies", "10.0.0.0/33"),
    ],
)
def test_invalid_values_are_named(monkeypatch, name, value):
    monkeypatch.setenv(f"SYNCBN_{name.upper()}", value)
    with pytest.raises(ValidationError, match=name):
        Settings()


def test_retention(monkeypatch):
    assert Settings().retention() is None
    monkeypatch.setenv("SYNCBN_RETENTION_DAYS", "30")
    assert Settings().retention() == timedelta(days=30)
