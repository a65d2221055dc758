"""Standard names in stored specs, failure kinds of jobs, recipes of comparisons."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

FIELDS = {
    "accumulate": "gradient_accumulation_steps",
    "clip_norm": "max_grad_norm",
    "deadline_seconds": "max_train_seconds",
    "schedule": "lr_schedule",
    "sharding": "data_partition",
}
ROWS_AT_ONCE = 500


def upgrade() -> None:
    """Rename the columns, and the fields of each spec and the paths that name them."""
    # Without a batch of Alembic, which makes SQLite's tables again: foreign keys to them do not allow that.
    op.execute("ALTER TABLE jobs RENAME COLUMN queue_seconds TO queue_timeout_seconds")
    op.execute("ALTER TABLE jobs RENAME COLUMN run_seconds TO max_run_seconds")
    op.add_column("jobs", sa.Column("failure_kind", sa.String(40)))
    op.add_column("comparisons", sa.Column("recipe", sa.JSON()))
    _rename("jobs", "id", {"spec": _rename_fields, "variant": _rename_paths})
    _rename("comparisons", "id", {"matrix": _rename_paths, "baseline": _rename_paths})


def _rename(name: str, key: str, columns: dict[str, Any]) -> None:
    table = sa.table(name, sa.column(key, sa.String), *[sa.column(column, sa.JSON) for column in columns])
    connection, last = op.get_bind(), ""
    while rows := connection.execute(
        sa.select(table).where(table.c[key] > last).order_by(table.c[key]).limit(ROWS_AT_ONCE)
    ).all():
        for row in rows:
            before = {column: getattr(row, column) for column in columns}
            after = {column: rename(before[column]) for column, rename in columns.items()}
            if json.dumps(before) != json.dumps(after):
                connection.execute(sa.update(table).where(table.c[key] == row[0]).values(**after))
        last = rows[-1][0]


def _rename_fields(spec: dict[str, Any]) -> dict[str, Any]:
    return {FIELDS.get(field, field): value for field, value in spec.items()}


def _rename_paths(content: dict[str, Any]) -> dict[str, Any]:
    """Rename the first part of each path that is a key, such as `schedule.steps`."""
    return {
        ".".join([FIELDS.get(first, first), *rest]): value
        for path, value in content.items()
        for first, *rest in [path.split(".")]
    }
