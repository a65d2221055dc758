"""Standard names in stored recipes, resources of jobs, and messages of webhooks."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

RESOURCES = {
    "least_cpus": "min_cpus",
    "least_gpus": "min_gpus",
    "most_cpus": "max_cpus",
    "most_gpus": "max_gpus",
}
TAKES = {"most": "max", "least": "min"}
ROWS_AT_ONCE = 500


def upgrade() -> None:
    """Rename the columns, and the fields of each rule and figure."""
    # In SQL: a batch of Alembic makes SQLite's tables again, which foreign keys to them do not allow.
    for before, after in RESOURCES.items():
        op.execute(f"ALTER TABLE jobs RENAME COLUMN {before} TO {after}")
    op.execute("ALTER TABLE deliveries RENAME COLUMN tries TO attempts")
    table = sa.table("comparisons", sa.column("id", sa.String), sa.column("recipe", sa.JSON))
    connection, last = op.get_bind(), ""
    while rows := connection.execute(
        sa.select(table).where(table.c.id > last).order_by(table.c.id).limit(ROWS_AT_ONCE)
    ).all():
        for row in rows:
            if row.recipe:
                connection.execute(
                    sa.update(table).where(table.c.id == row.id).values(recipe=_renamed(row.recipe))
                )
        last = rows[-1].id


def _renamed(recipe: dict[str, Any]) -> dict[str, Any]:
    lists = {
        name: [_figure(each) for each in recipe[name]] for name in ("verdict", "figures") if name in recipe
    }
    return recipe | lists


def _figure(figure: dict[str, Any]) -> dict[str, Any]:
    found = {"label" if name == "says" else name: value for name, value in figure.items()}
    if found.get("measure"):
        take = found["measure"]["take"]
        found["measure"] = found["measure"] | {"take": TAKES.get(take, take)}
    return found
