from datetime import UTC, datetime, timedelta

import pytest

from service.domain.access import Caller, RateLimit, Scope, Token, hash_secret, new_secret

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("held", "implied"),
    [
        (["metrics"], {"metrics"}),
        (["read"], {"read"}),
        (["submit"], {"read", "submit"}),
        (["admin"], {"metrics", "read", "submit", "admin"}),
        (["read", "submit"], {"read", "submit"}),
    ],
)
def test_a_scope_implies_the_smaller_ones(held, implied):
    caller = Caller("ann", tuple(map(Scope, held)), "token-1")
    assert {scope for scope in Scope if caller.may(scope)} == implied
    assert caller.sees_only == (None if "admin" in held else "ann")


def test_a_token_is_valid_until_it_expires_or_is_revoked():
    def token(**changes):
        return Token(id="token-1", owner="ann", name="x", scopes=(Scope.READ,), created_at=NOW, **changes)

    assert token().is_valid(NOW)
    assert token(expires_at=NOW + timedelta(seconds=1)).is_valid(NOW)
    assert not token(expires_at=NOW).is_valid(NOW)
    assert not token(revoked_at=NOW).is_valid(NOW)


def test_secrets_are_random_and_long_and_their_hashes_differ():
    made = {new_secret() for _ in range(100)}
    assert len({hash_secret(secret) for secret in made}) == 100
    assert all(secret.startswith("syncbn_") and len(secret) == 50 for secret in made)


def test_a_bucket_allows_a_burst_and_then_a_rate():
    limit = RateLimit(per_second=2, burst=3)
    assert [limit.take("a", 100.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert limit.take("b", 100.0) == 0
    assert limit.take("a", 100.4) == pytest.approx(0.1)
    assert limit.take("a", 100.5) == 0
    assert limit.take("a", 100.5) == pytest.approx(0.5)
    assert [limit.take("a", 200.0) for _ in range(4)] == [0, 0, 0, 0.5]


def test_full_buckets_are_discarded():
    limit = RateLimit(per_second=1, burst=1)
    for number in range(25_000):
        limit.take(str(number), now=float(number))
    assert len(limit._full_at) <= 10_000
    assert limit.take("24999", 24_999.0) > 0
