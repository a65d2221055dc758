"""Tables of the database.

A change needs a migration; a test compares the two.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    false,
)


class UtcDateTime(TypeDecorator[datetime]):
    """Timestamp with time zone, also on SQLite, which stores none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Read as UTC."""
        return None if value is None else (value if value.tzinfo else value.replace(tzinfo=UTC))


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("owner", String(80), nullable=False),
    Column("matrix", JSON, nullable=False),
    Column("baseline", JSON, nullable=False),
    Column("metric", String(200), nullable=False),
    Column("target", Float),
    Column("recipe", JSON),
    Column("mlflow_run_id", String(64)),
    Column("mlflow_experiment_id", String(64)),
    Column("mlflow_closed", Boolean, nullable=False, server_default=false()),
    Column("created_at", UtcDateTime, nullable=False),
    # The place in lists; the jobs of a comparison have consecutive sequences.
    Column("first_job_sequence", Integer, nullable=False, server_default="0"),
    Index("ix_comparisons_first_job_sequence", "first_job_sequence"),
    Index("ix_comparisons_owner_first_job", "owner", "first_job_sequence"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("owner", String(80), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("preemptible", Boolean, nullable=False, server_default=false()),
    Column("retries", JSON, nullable=False),
    Column("secrets", JSON, nullable=False),
    Column("queue_timeout_seconds", Float),
    # Of its first attempt; computed from the above.
    Column("queue_until", UtcDateTime),
    Column("max_run_seconds", Float),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("failures", JSON, nullable=False),
    Column("failure_kind", String(40)),
    Column("cancel_requested", Boolean, nullable=False),
    Column("pause_requested", Boolean, nullable=False, server_default=false()),
    Column("preempted_by", String(40)),
    Column("stop_requested_at", UtcDateTime),
    Column("comparison_id", ForeignKey("comparisons.id"), index=True),
    Column("variant", JSON, nullable=False),
    Column("resumed_from", String(40)),
    Column("cloned_from", String(40)),
    Column("progress", JSON),
    Column("mlflow_run_id", String(64)),
    Column("mlflow_experiment_id", String(64)),
    Column("mlflow_closed", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("queued_at", UtcDateTime, nullable=False),
    Column("not_before", UtcDateTime),
    Column("started_at", UtcDateTime),
    Column("ran_seconds", Float, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("version", Integer, nullable=False),
    # What is asked for in SQL of the things above.
    Column("norm", String(20), nullable=False),
    Column("shard", Integer, nullable=False),
    Column("stored_bytes", Integer, nullable=False, server_default="0"),
    Column("min_cpus", Float, nullable=False),
    Column("min_gpus", Float, nullable=False),
    Column("max_cpus", Float, nullable=False),
    Column("accelerator_type", String(64)),
    Column("max_gpus", Float, nullable=False),
    Index("ix_jobs_unsettled", "mlflow_closed", "state", "sequence"),
    Index("ix_jobs_owner_sequence", "owner", "sequence"),
    Index("ix_jobs_state_sequence", "state", "sequence"),
    Index("ix_jobs_norm_sequence", "norm", "sequence"),
    Index("ix_jobs_ended_at", "ended_at"),
    Index("ix_jobs_resumed_from", "resumed_from"),
)

deleted_jobs = Table("deleted_jobs", metadata, Column("id", String(40), primary_key=True))
"""Deleted jobs whose folders still exist."""

job_tags = Table(
    "job_tags",
    metadata,
    Column("tag", String(80), primary_key=True),
    Column("job_sequence", ForeignKey("jobs.sequence"), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False, index=True),
)

events = Table(
    "events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False, index=True),
    Column("at", UtcDateTime, nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", String(80), nullable=False),
    Column("attempt", Integer, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("seen_at", UtcDateTime, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(80)),
    Column("token", Integer, nullable=False),
    Column("until", UtcDateTime, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("owner", String(80), nullable=False),
    Column("name", String(200), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
)

credentials = Table(
    "credentials",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("kind", String(20), nullable=False),
    # Of a sign-in link or session.
    Column("token_id", String(40)),
    # Of an attempt.
    Column("job_id", String(40)),
    Column("attempt", Integer),
    Column("uploaded_bytes", BigInteger, nullable=False, server_default="0"),
    Column("expires_at", UtcDateTime, index=True),
)
"""Credentials other than tokens; `service.domain.access` has the kinds."""

audit = Table(
    "audit",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", String(80), nullable=False),
    Column("token_id", String(40)),
    Column("action", String(40), nullable=False),
    Column("subject", String(80), nullable=False),
    Column("detail", Text, nullable=False),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("owner", String(80), nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("secret", String(80), nullable=False),
    Column("states", JSON, nullable=False),
    Column("thresholds", JSON, nullable=False),
    Column("has_thresholds", Boolean, nullable=False),
    Column("tag", String(80)),
    Column("created_at", UtcDateTime, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("webhook_id", ForeignKey("webhooks.id"), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), nullable=False, index=True),
    Column("about", String(300), nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("due_at", UtcDateTime, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("is_delivered", Boolean, nullable=False),
    Column("answer", Text, nullable=False),
    # One message per event, whichever replica stores it.
    Index("ix_deliveries_about", "webhook_id", "job_id", "about", unique=True),
    Index("ix_deliveries_due", "ended_at", "due_at"),
    Index("ix_deliveries_next", "webhook_id", "ended_at", "due_at"),
)

usage = Table(
    "usage",
    metadata,
    Column("owner", String(80), primary_key=True),
    Column("gpu_seconds", Float, nullable=False),
    Column("cpu_seconds", Float, nullable=False),
    # Of jobs that are stored now.
    Column("stored_bytes", BigInteger, nullable=False, server_default="0"),
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("owner", String(80), primary_key=True),
    # Of UTC.
    Column("day", Date, primary_key=True),
    Column("gpu_seconds", Float, nullable=False),
    Column("cpu_seconds", Float, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(80), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("headers", JSON, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, index=True),
)
