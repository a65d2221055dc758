"""Commands of docs/operations.md, run as they are written there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import inspect, make_url, text

from service.domain.errors import NotFound
from service.domain.lifecycle import RayStatus
from service.store.database import Database
from service.store.job_rows import job_row
from service.store.jobs import JobStore
from service.store.tokens import TokenStore
from tests.service.databases import find_programs
from tests.service.engine.replica_fixture import ReplicaFixture
from tests.service.examples import make_job
from tests.service.store.earlier import empty_at, insert_row
from trainer.jobspec import OUTCOME_FILE, Outcome

DOCS = Path(__file__).parents[3] / "docs" / "operations.md"


class Operator:
    """Runs the commands in their order in the docs, in one folder."""

    def __init__(self, folder, database):
        engine = database._engine.url
        programs = find_programs()
        self.folder, self.kind = folder, engine.get_backend_name()
        path = os.pathsep.join([str(Path(sys.executable).parent), str(programs or ""), os.environ["PATH"]])
        address = make_url(engine).set(drivername="postgresql").render_as_string(hide_password=False)
        self.environment = os.environ | {"PATH": path, "DATABASE": address}
        commands = re.findall(r"```sh\n(.*?)\n```", DOCS.read_text(), re.DOTALL)
        self.sqlite, self.postgresql = commands[:2], commands[2:]
        if self.kind == "sqlite":
            self.database_file = Path(engine.database)

    def run(self, number):
        command = (self.sqlite if self.kind == "sqlite" else self.postgresql)[number]
        if self.kind == "sqlite":
            command = command.replace("service.db", self.database_file.name)
        subprocess.run(
            ["bash", "-ec", command], cwd=self.folder, env=self.environment, check=True, timeout=60
        )


@pytest.fixture
async def operator(database, tmp_path):
    return Operator(tmp_path, database)


async def test_a_restored_database_is_reconciled_with_ray_and_storage(database, tmp_path, operator):
    if operator.kind == "postgresql" and not shutil.which("pg_dump", path=operator.environment["PATH"]):
        pytest.skip("pg_dump is not installed")
    replica = ReplicaFixture(database, tmp_path / "storage")
    await TokenStore(database).ensure_admin("the secret of an admin", print)
    queued = await replica.add(tags=("nightly",))
    await replica.jobs.request_cancel((await replica.add(name="cancelled since")).id, "ann")
    operator.run(0)
    replica.write(queued, OUTCOME_FILE, Outcome(state="succeeded", reason="finished 10 steps"))
    await replica.tick()
    replica.ray.set(queued.submission_id, RayStatus.SUCCEEDED)
    await replica.tick()
    assert await replica.state(queued) == "succeeded"
    since = await replica.add(name="submitted since")
    await database.close()

    operator.run(1)
    database = Database(database._engine.url.render_as_string(hide_password=False), 10)
    try:
        await database.migrate()
        ray = replica.ray
        replica = ReplicaFixture(database, tmp_path / "storage", ray=ray)
        restored = await replica.jobs.get(queued.id)
        assert (restored.state, restored.tags, restored.spec) == ("queued", queued.tags, queued.spec)
        assert [event.reason for event in await replica.jobs.events_of(queued.id)] == [
            "submitted by the user"
        ]
        assert await TokenStore(database).find("the secret of an admin") is not None
        with pytest.raises(NotFound):
            await replica.jobs.get(since.id)
        for _ in range(3):
            await replica.tick()
        assert await replica.state(queued) == "succeeded"
        assert len(ray.tasks[queued.submission_id]) == 1
        assert [job.state for job in (await replica.jobs.page(10, None))[0]] == ["cancelled", "succeeded"]
    finally:
        await database.close()


async def test_a_database_is_rolled_back_and_upgraded_again(database, operator):
    if operator.kind == "postgresql" and not shutil.which("pg_dump", path=operator.environment["PATH"]):
        pytest.skip("pg_dump is not installed")
    job = make_job()
    async with empty_at(database, "0013") as connection:
        await insert_row(connection, "jobs", job_row(job))
    operator.run(0)
    url = database._engine.url.render_as_string(hide_password=False)
    for _ in range(2):
        await database.migrate()
        assert await JobStore(database).get(job.id) == job
        await database.close()
        if operator.kind == "postgresql":
            operator.run(2)
        operator.run(1)
        database = Database(url, 10)
        async with database.read() as connection:
            tables = await connection.run_sync(lambda c: inspect(c).get_table_names())
            version = await connection.execute(text("SELECT version_num FROM alembic_version"))
        assert version.scalar_one() == "0013"
        assert "usage_days" not in tables
    await database.close()
