"""Owners, priorities, retries and deadlines of jobs; replicas and leases."""

import json
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def new_columns() -> list[sa.Column[Any]]:
    """What jobs get; the defaults are for those that are there."""
    return [
        sa.Column("owner", sa.String(80), nullable=False, server_default="admin"),
        sa.Column("tags", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("retries", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("queue_seconds", sa.Float()),
        sa.Column("run_seconds", sa.Float()),
        sa.Column("failures", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("resumed_from", sa.String(40)),
        sa.Column("cloned_from", sa.String(40)),
        sa.Column("queued_at", TIME, nullable=False, server_default="1970-01-01 00:00:00"),
        sa.Column("not_before", TIME),
        sa.Column("ran_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("norm", sa.String(20), nullable=False, server_default=""),
        sa.Column("shard", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("least_cpus", sa.Float(), nullable=False, server_default="0"),
        sa.Column("least_gpus", sa.Float(), nullable=False, server_default="0"),
        sa.Column("most_cpus", sa.Float(), nullable=False, server_default="0"),
        sa.Column("most_gpus", sa.Float(), nullable=False, server_default="0"),
    ]


def upgrade() -> None:
    """Add columns, compute them for existing jobs, and create tables."""
    columns = new_columns()
    names = [column.name for column in columns]
    # Without a batch of Alembic, which makes SQLite's tables again: foreign keys to them do not allow that.
    for column in columns:
        op.add_column("jobs", column)
    jobs = sa.table("jobs", *(sa.column(name) for name in ("id", "sequence", "spec", "created_at", *names)))
    connection = op.get_bind()
    for row in connection.execute(
        sa.select(jobs.c.id, sa.cast(jobs.c.spec, sa.Text), jobs.c.created_at)
    ).all():
        spec = json.loads(row[1])
        workers = spec.get("num_workers", 1)
        least, most = workers if isinstance(workers, list) else (workers, workers)
        on_gpu = bool(spec.get("use_gpu"))
        values = {
            "queued_at": row.created_at,
            "norm": spec.get("norm", ""),
            "shard": crc32(row.id.encode()) % 8,
            "least_cpus": least,
            "most_cpus": most,
            "least_gpus": least if on_gpu else 0,
            "most_gpus": most if on_gpu else 0,
        }
        connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(**values))
    # The defaults stay: SQLite cannot drop them, and each new row has all values.
    op.create_index("ix_jobs_owner_sequence", "jobs", ["owner", "sequence"])
    op.create_index("ix_jobs_state_sequence", "jobs", ["state", "sequence"])
    op.create_index("ix_jobs_norm_sequence", "jobs", ["norm", "sequence"])
    with op.batch_alter_table("events") as batch:
        batch.alter_column("actor", existing_type=sa.String(40), type_=sa.String(80))
    op.create_table(
        "job_tags",
        sa.Column("tag", sa.String(80), nullable=False),
        sa.Column(
            "job_id", sa.String(40), sa.ForeignKey("jobs.id", name="fk_job_tags_job_id"), nullable=False
        ),
        sa.PrimaryKeyConstraint("tag", "job_id", name="pk_job_tags"),
    )
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("seen_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_replicas"),
    )
    leases = op.create_table(
        "leases",
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("holder", sa.String(80)),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("until", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    parts = ["scheduler", *(f"shard-{number}" for number in range(8))]
    op.bulk_insert(
        leases, [{"name": name, "token": 0, "until": datetime(1970, 1, 1, tzinfo=UTC)} for name in parts]
    )
