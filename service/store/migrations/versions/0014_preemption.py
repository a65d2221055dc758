"""Preemptible jobs, requests to pause and stop, types of GPUs, and usage by day."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the table.

    No earlier job is preemptible or paused, and days begin with the next attempt that ends.
    """
    # Without a batch of Alembic, which makes SQLite's tables again: foreign keys to them do not allow that.
    for name in ("preemptible", "pause_requested"):
        op.add_column("jobs", sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("preempted_by", sa.String(40)))
    op.add_column("jobs", sa.Column("stop_requested_at", sa.DateTime(timezone=True)))
    op.add_column("jobs", sa.Column("accelerator_type", sa.String(64)))
    op.create_table(
        "usage_days",
        sa.Column("owner", sa.String(80), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("cpu_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "day", name="pk_usage_days"),
    )
