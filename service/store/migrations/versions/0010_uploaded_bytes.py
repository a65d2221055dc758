"""Bytes that each attempt has uploaded to MLflow."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    with op.batch_alter_table("credentials") as batch:
        batch.add_column(sa.Column("uploaded_bytes", sa.BigInteger(), nullable=False, server_default="0"))
