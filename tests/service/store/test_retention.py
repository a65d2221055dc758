import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import event

from service.domain.jobs import JobState
from service.store.database import Database
from service.store.job_inserts import insert_jobs
from service.store.retention import RetentionStore
from tests.service.examples import make_job


async def test_thousands_are_deleted_in_time(database, replica):
    replica.policy = replica.policy.__class__(max_active=0)
    long_ago = datetime.now(UTC) - timedelta(days=40)
    many = [
        make_job(state=JobState.SUCCEEDED, ended_at=long_ago, created_at=long_ago, mlflow_closed=True)
        for _ in range(4_000)
    ]
    async with database.write() as connection:
        await insert_jobs(connection, many)
    store, began = RetentionStore(database), time.monotonic()
    for _ in range(4):
        assert await store.delete_jobs(datetime.now(UTC), 50) == 50
    assert time.monotonic() - began < 15  # without an index on the source of resumed jobs it takes minutes


async def test_sqlite_finds_the_oldest_by_indexes_alone(tmp_path):
    database = Database(f"sqlite+aiosqlite:///{tmp_path}/test.db", 5)
    await database.migrate()
    plans = []

    def explain(connection, _, statement, parameters, *__):
        if statement.startswith("SELECT jobs.id"):
            plans.append(
                "\n".join(
                    row[3]
                    for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                )
            )

    event.listen(database._engine.sync_engine, "before_cursor_execute", explain)
    await RetentionStore(database).delete_jobs(datetime.now(UTC), 50)
    await database.close()
    assert "ix_jobs_ended_at" in plans[0]
    assert "ix_jobs_resumed_from" in plans[0]
    assert "TEMP B-TREE" not in plans[0]  # all old jobs would be sorted for each few that are deleted
    assert "SCAN" not in plans[0]
