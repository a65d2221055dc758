"""Page tokens: the place in a list at which its next page begins."""

import base64
import binascii
import re
from typing import Annotated

from fastapi import Query

from service.api.schemas.names import MAX_PAGE_SIZE
from trainer.jobspec import InvalidField

MAX_SEQUENCE = 2**31 - 1
PageSize = Annotated[int, Query(ge=1, le=MAX_PAGE_SIZE)]
PageToken = Annotated[str | None, Query(description="`next_page_token` of the page before")]


def encode_page_token(place: int | None) -> str | None:
    """Encode a place as a page token."""
    return None if place is None else base64.urlsafe_b64encode(str(place).encode()).decode().rstrip("=")


def decode_page_token(token: str | None) -> int | None:
    """Decode a page token. Raises InvalidField."""
    if not token:
        return None
    try:
        text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    except (binascii.Error, ValueError):
        text = ""
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > MAX_SEQUENCE:
        raise InvalidField("page_token", token, "must be the next_page_token of an earlier answer")
    return int(text)
