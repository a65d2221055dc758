"""Upgrades of databases of all earlier versions, with rows of each kind."""

import hashlib
import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import text

from service.domain.access import CredentialKind
from service.domain.jobs import JobState, new_id
from service.domain.leases import SHARDS
from service.domain.lifecycle import RayStatus
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.database import MIGRATIONS
from service.store.idempotency import IdempotencyStore
from service.store.job_rows import job_row
from service.store.jobs import Filter, JobStore
from service.store.leases import LeaseStore
from service.store.retention import RetentionStore
from service.store.tokens import TokenStore
from service.store.usage import Period
from service.store.webhooks import WebhookStore
from tests.service.databases import migrate, run_apart
from tests.service.engine.replica_fixture import ReplicaFixture
from tests.service.examples import make_job
from tests.service.store.earlier import copy_to_revision, empty_at, insert_row
from tests.service.store.stored import to
from trainer.jobspec import DRIVER_FILE, OUTCOME_FILE, PROGRESS_FILE, JobSpec, StepSchedule

REVISIONS = sorted(each.revision for each in ScriptDirectory(str(MIGRATIONS)).walk_revisions())
NOW = datetime(2026, 1, 2, tzinfo=UTC)
SPEC = {
    "steps": 9,
    "num_workers": 2,
    "max_grad_norm": 0.5,
    "lr_schedule": {"name": "step", "steps": [3], "factor": 0.5},
}
EARLIER_SPEC = {
    "steps": 9,
    "num_workers": 2,
    "clip_norm": 0.5,
    "schedule": {"name": "step", "steps": [3], "factor": 0.5},
}
READ_SPEC = JobSpec(
    steps=9,
    num_workers=2,
    max_grad_norm=0.5,
    lr_schedule=StepSchedule(name="step", steps=[3], factor=0.5),
)


def test_every_revision_is_upgraded():
    assert [f"{number:04}" for number in range(1, len(REVISIONS) + 1)] == REVISIONS


async def insert_all(connection, revision, jobs):
    """Insert a comparison with jobs in each state, and a row of every other kind."""
    comparison = {
        "id": "comparison-1", "name": "old", "owner": "admin", "matrix": {"norm": ["none", "sync"]},
        "baseline": {"norm": "none"}, "metric": "accuracy", "created_at": NOW, "mlflow_closed": False,
    }  # fmt: skip
    await insert_row(connection, "comparisons", comparison)
    for number, job in enumerate(jobs, start=1):
        stored = job_row(job) | {"spec": EARLIER_SPEC if revision < "0011" else SPEC, "sequence": number}
        await insert_row(connection, "jobs", stored | {"queue_seconds": job.queue_timeout_seconds})
        event = {"job_id": job.id, "state": job.state.value, "reason": job.reason, "at": NOW}
        await insert_row(connection, "events", event | {"attempt": job.attempt, "actor": "dispatcher"})
        await insert_row(connection, "job_tags", {"tag": "a", "job_id": job.id, "job_sequence": number})
    token = {"id": "token-1", "owner": "admin", "name": "x", "scopes": ["admin"], "created_at": NOW}
    await insert_row(connection, "tokens", token | {"hash": hashlib.sha256(b"syncbn_secret").hexdigest()})
    audit = {"at": NOW, "actor": "admin", "action": "token.create", "subject": "token-1", "detail": "x"}
    await insert_row(connection, "audit", audit)
    webhook = {
        "id": "webhook-1", "owner": "admin", "url": "https://a.example/x", "secret": "s", "created_at": NOW,
        "states": ["failed"], "thresholds": [], "has_thresholds": False,
    }  # fmt: skip
    await insert_row(connection, "webhooks", webhook)
    delivery = {
        "id": "delivery-1", "webhook_id": "webhook-1", "job_id": jobs[0].id, "about": "failed", "body": "{}",
        "created_at": NOW, "due_at": NOW, "attempts": 1, "tries": 1, "is_delivered": False, "answer": "",
    }  # fmt: skip
    await insert_row(connection, "deliveries", delivery)
    credential = {
        "hash": hashlib.sha256(b"of the attempt").hexdigest(), "kind": CredentialKind.ATTEMPT.value,
        "job_id": jobs[2].id, "attempt": 1,
    }  # fmt: skip
    await insert_row(connection, "credentials", credential)
    await insert_row(connection, "deleted_jobs", {"id": "job-gone"})
    key = {"owner": "admin", "key": "k", "fingerprint": "f", "status": 202, "headers": {}, "body": b"{}"}
    await insert_row(connection, "idempotency_keys", key | {"created_at": datetime.now(UTC)})
    usage = {"owner": "admin", "gpu_seconds": 0.0, "cpu_seconds": 12.0}
    await insert_row(connection, "usage", usage)


@pytest.mark.parametrize("revision", REVISIONS[:-1])
async def test_a_database_of_an_earlier_version_is_migrated(database, revision):
    jobs = [
        make_job(
            id=new_id("job"), spec=READ_SPEC, state=state, reason=f"was {state}",
            comparison_id="comparison-1", variant={"norm": "sync"}, tags=("a",), ran_seconds=2.0,
            created_at=NOW, queued_at=NOW, queue_timeout_seconds=5.0, mlflow_run_id="run",
            mlflow_closed=state.is_terminal, started_at=NOW if state == JobState.RUNNING else None,
            ended_at=NOW if state.is_terminal else None,
        )
        for state in JobState
    ]  # fmt: skip
    async with empty_at(database, revision) as connection:
        await insert_all(connection, revision, jobs)
    await database.migrate()
    store = JobStore(database)
    for job in jobs:
        read = await store.get(job.id)
        assert (read.state, read.reason, read.spec) == (job.state, job.reason, READ_SPEC)
        assert (read.owner, read.variant, read.version) == (job.owner, job.variant, job.version)
        assert (read.attempt, read.started_at, read.queued_at) == (1, job.started_at, NOW)
        assert (read.preemptible, read.pause_requested, read.stop_requested_at) == (False, False, None)
        assert [event.reason for event in await store.events_of(job.id)] == [job.reason]
        if revision >= "0002":
            assert (read.tags, read.ran_seconds, read.queue_timeout_seconds) == (("a",), 2.0, 5.0)
    wanted = Filter(tag="a") if revision >= "0002" else Filter()
    assert [job.id for job in (await store.page(9, None, wanted))[0]] == [job.id for job in jobs[::-1]]
    # The queue, the open jobs and the leases are those of the new version.
    queue = await store.queue()
    assert [candidate.id for candidate in queue.waiting.values()] == [jobs[0].id]
    assert [candidate.max_resources.cpus for candidate in queue.active] == [2, 2]
    open_jobs = {job.id for job in await store.open_jobs(range(SHARDS))}
    assert open_jobs >= {jobs[1].id, jobs[2].id}
    assert len(await LeaseStore(database).keep("one", 5)) == 1 + SHARDS
    for job, state in zip(jobs[:3], ("submitted", "running", "succeeded"), strict=True):
        assert await store.advance(await store.get(job.id), to(state), "dispatcher")
    comparison = await ComparisonStore(database).get("comparison-1")
    assert (comparison.name, comparison.owner, comparison.baseline) == ("old", "admin", {"norm": "none"})
    if revision >= "0003":
        token = await TokenStore(database).find("syncbn_secret")
        assert token.id == "token-1"
        assert (await IdempotencyStore(database).find("admin", "k")).status == 202
    if revision >= "0004":
        webhook = await WebhookStore(database).get("webhook-1")
        assert webhook.url == "https://a.example/x"
        deliveries, _ = await WebhookStore(database).deliveries_of(webhook.id, 9, None)
        assert [each.id for each in deliveries][-1] == "delivery-1"
    if revision >= "0005":
        assert await RetentionStore(database).folders_left() == ["job-gone"]
    if revision >= "0008":
        grant = await CredentialStore(database).find_grant("of the attempt")
        assert grant is None or grant.job_id == jobs[2].id
    used = (await store.usage(Period()))["admin"].cpu_seconds
    assert used > timedelta(days=1).total_seconds()  # of the attempt that has run since NOW
    await database.check()


@pytest.mark.parametrize("revision", ["0002", REVISIONS[-2]])
async def test_a_running_job_survives_an_upgrade(database, tmp_path, revision):
    """Its files, heartbeat and leases are those of the previous version."""
    job = make_job(state=JobState.RUNNING, started_at=NOW, mlflow_run_id="run")
    async with empty_at(database, revision) as connection:
        await insert_row(connection, "jobs", job_row(job) | {"sequence": 1})
        held = "UPDATE leases SET holder = 'previous', token = 7, until = '2026-01-01 00:00:00'"
        await connection.execute(text(held))
    await database.migrate()
    replica = ReplicaFixture(database, tmp_path / "storage")
    replica.ray.set(job.submission_id, RayStatus.RUNNING)
    folder = replica.files.attempt_folder(job)
    folder.mkdir(parents=True)
    (folder / DRIVER_FILE).write_text("boot/pid 7 1.0")
    progress = {"step": 3, "total_steps": 9, "samples_per_second": 5.0, "eta_seconds": 1.0}
    (folder / PROGRESS_FILE).write_text(json.dumps(progress))
    await replica.tick()
    assert replica.lease_holder.of_job(job.id).token == 8
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.attempt, seen.progress.step) == (JobState.RUNNING, 1, 3)
    assert not replica.ray.tasks  # nothing is submitted twice
    (folder / OUTCOME_FILE).write_text('{"state": "succeeded", "reason": "finished 9 steps"}')
    replica.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    await replica.tick()
    seen = await replica.jobs.get(job.id)
    assert (seen.state, seen.reason) == (JobState.SUCCEEDED, "finished 9 steps")


def test_a_database_can_be_copied_to_an_earlier_version(tmp_path):
    """As the test on a real Ray does."""
    path = tmp_path / "test.db"
    run_apart(migrate(f"sqlite+aiosqlite:///{path}"))
    copy_to_revision(path, REVISIONS[0])
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (REVISIONS[0],)
