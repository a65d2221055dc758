"""Index of the jobs of a tag, newest first."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Recreate the table of tags, with the places of the jobs."""
    op.rename_table("job_tags", "job_tags_before")
    op.create_table(
        "job_tags",
        sa.Column("tag", sa.String(80), nullable=False),
        sa.Column("job_sequence", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("tag", "job_sequence", name="pk_job_tags_of_jobs"),
        sa.ForeignKeyConstraint(["job_sequence"], ["jobs.sequence"], name="fk_job_tags_job_sequence"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_tags_of_jobs_job_id"),
    )
    op.execute(
        "INSERT INTO job_tags (tag, job_sequence, job_id) "
        "SELECT tag, jobs.sequence, jobs.id FROM job_tags_before JOIN jobs ON jobs.id = "
        "job_tags_before.job_id"
    )
    op.drop_table("job_tags_before")
    op.create_index("ix_job_tags_job_id", "job_tags", ["job_id"])
