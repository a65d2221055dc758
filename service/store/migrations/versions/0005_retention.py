"""Indexes for retention and webhooks, folders to delete, audit without addresses."""

from urllib.parse import urlsplit

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create tables and indexes, and reduce the addresses of webhooks to hosts.

    Paths of webhooks may be secrets.
    """
    op.create_table(
        "deleted_jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_deleted_jobs"),
    )
    op.create_index("ix_jobs_resumed_from", "jobs", ["resumed_from"])
    op.create_index("ix_deliveries_next", "deliveries", ["webhook_id", "ended_at", "due_at"])
    audit = sa.table("audit", sa.column("sequence"), sa.column("action"), sa.column("detail"))
    connection = op.get_bind()
    about_webhooks = sa.select(audit.c.sequence, audit.c.detail).where(audit.c.action.like("webhook.%"))
    for sequence, detail in connection.execute(about_webhooks).all():
        address = urlsplit(detail.removeprefix("to "))
        host = f"to {address.scheme}://{address.hostname}"
        connection.execute(sa.update(audit).where(audit.c.sequence == sequence).values(detail=host))
