"""Bytes that jobs take in the database, and their sum by owner."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; what is stored already counts."""
    with op.batch_alter_table("jobs") as batch:
        batch.add_column(sa.Column("stored_bytes", sa.Integer(), nullable=False, server_default="0"))
    with op.batch_alter_table("usage") as batch:
        batch.add_column(sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE jobs SET stored_bytes = LENGTH(CAST(spec AS TEXT)) + LENGTH(CAST(variant AS TEXT)) + 1000")
    op.execute(
        "INSERT INTO usage (owner, gpu_seconds, cpu_seconds, stored_bytes) "
        "SELECT DISTINCT owner, 0.0, 0.0, 0 FROM jobs WHERE owner NOT IN (SELECT owner FROM usage)"
    )
    op.execute(
        "UPDATE usage SET stored_bytes = "
        "(SELECT COALESCE(SUM(jobs.stored_bytes), 0) FROM jobs WHERE jobs.owner = usage.owner)"
    )
