from datetime import UTC, datetime

import pytest

from service.domain.errors import NotFound
from tests.service.store.token_fixtures import ANN, make_token


async def test_revocation_is_final_and_audited(tokens, audit):
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
