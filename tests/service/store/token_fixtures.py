"""Tokens for tests."""

from datetime import UTC, datetime

from service.domain.access import Caller, Scope, Token
from service.domain.jobs import new_id

ANN = Caller("ann", (Scope.ADMIN,), "token-of-ann")


def make_token(**changes):
    values = {"id": new_id("token"), "owner": "ann", "name": "laptop", "scopes": (Scope.SUBMIT,)}
    return Token(**(values | {"created_at": datetime.now(UTC)} | changes))
