"""Keyset pagination of tables, newest first.

Rows that are inserted meanwhile do not shift later pages.
"""

from typing import Any

from sqlalchemy import Column, Row, Select
from sqlalchemy.ext.asyncio import AsyncConnection


async def read_page(
    connection: AsyncConnection, query: Select[Any], sequence: Column[int], size: int, before: int | None
) -> tuple[list[Row[Any]], int | None]:
    """Return up to `size` rows before a place, and the place of the next page."""
    query = query.add_columns(sequence.label("place")).order_by(sequence.desc()).limit(size + 1)
    if before is not None:
        query = query.where(sequence < before)
    rows = list((await connection.execute(query)).all())
    return rows[:size], rows[size - 1].place if len(rows) > size else None
