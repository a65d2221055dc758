"""Type of names, and bounds that several schemas share."""

from typing import Annotated

from pydantic import Field

Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=120,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._=,@+-]*$",
        description="letters, digits, spaces and ._=,@+- ; starts with a letter or digit",
    ),
]

MAX_PAGE_SIZE = 200
"""Entries on one page of a list, at most."""
