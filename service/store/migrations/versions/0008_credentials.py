"""Sign-in links, sessions and credentials of attempts."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "credentials",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("token_id", sa.String(40)),
        sa.Column("job_id", sa.String(40)),
        sa.Column("attempt", sa.Integer()),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("hash", name="pk_credentials"),
    )
    op.create_index("ix_credentials_expires_at", "credentials", ["expires_at"])
