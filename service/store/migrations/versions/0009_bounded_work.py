"""Stored bytes of jobs and owners, and end of the queue time of jobs."""

from datetime import timedelta

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
        batch.add_column(sa.Column("queue_until", sa.DateTime(timezone=True)))
    with op.batch_alter_table("usage") as batch:
        batch.add_column(sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE jobs SET stored_bytes = LENGTH(CAST(spec AS TEXT)) + LENGTH(CAST(variant AS TEXT)) + 1000"
    )
    op.execute(
        "INSERT INTO usage (owner, gpu_seconds, cpu_seconds, stored_bytes) "
        "SELECT DISTINCT owner, 0.0, 0.0, 0 FROM jobs WHERE owner NOT IN (SELECT owner FROM usage)"
    )
    op.execute(
        "UPDATE usage SET stored_bytes = "
        "(SELECT COALESCE(SUM(jobs.stored_bytes), 0) FROM jobs WHERE jobs.owner = usage.owner)"
    )
    jobs = sa.table(
        "jobs",
        sa.column("id", sa.String),
        sa.column("state", sa.String),
        sa.column("queue_seconds", sa.Float),
        sa.column("created_at", sa.DateTime(timezone=True)),
        sa.column("queue_until", sa.DateTime(timezone=True)),
    )
    connection = op.get_bind()
    waiting = sa.select(jobs).where(jobs.c.queue_seconds.is_not(None), jobs.c.state == "queued")
    for row in connection.execute(waiting).all():
        until = row.created_at + timedelta(seconds=row.queue_seconds)
        connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(queue_until=until))
