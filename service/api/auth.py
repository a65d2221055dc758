"""Who may call: whoever shows the service's bearer token."""

import secrets
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

bearer = HTTPBearer(auto_error=False, description="the service's token; `connection.json` holds it")


def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> None:
    """Let a request pass that carries the right token; the comparison takes the same time for every wrong one."""
    expected: str = request.app.state.settings.token.get_secret_value()
    if credentials is None or not secrets.compare_digest(credentials.credentials.encode(), expected.encode()):
        detail = "this call needs the header `Authorization: Bearer <token>` with a valid token"
        raise HTTPException(401, detail, headers={"WWW-Authenticate": "Bearer"})
