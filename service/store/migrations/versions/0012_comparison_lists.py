"""Place of each comparison in lists: the sequence of its first job."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, fill it, and add its indexes."""
    with op.batch_alter_table("comparisons") as batch:
        batch.add_column(sa.Column("first_job_sequence", sa.Integer(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE comparisons SET first_job_sequence = COALESCE("
        "(SELECT MIN(jobs.sequence) FROM jobs WHERE jobs.comparison_id = comparisons.id), 0)"
    )
    op.create_index("ix_comparisons_first_job_sequence", "comparisons", ["first_job_sequence"])
    op.create_index("ix_comparisons_owner_first_job", "comparisons", ["owner", "first_job_sequence"])
