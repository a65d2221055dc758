"""Type of names, and bounds that several schemas share."""

from typing import Annotated, Any

from pydantic import Field

Examples = dict[str, dict[str, Any]]
"""Examples of a request by name."""

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
"""Maximum number of entries on one page of a list."""
