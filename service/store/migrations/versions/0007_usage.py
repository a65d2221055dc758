"""Usage of owners, independent of their jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table, with what the jobs say that are there."""
    op.create_table(
        "usage",
        sa.Column("owner", sa.String(80), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("cpu_seconds", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name="pk_usage"),
    )
    op.execute(
        "INSERT INTO usage (owner, gpu_seconds, cpu_seconds) "
        "SELECT owner, SUM(ran_seconds * most_gpus), SUM(ran_seconds * most_cpus) FROM jobs GROUP BY owner"
    )
