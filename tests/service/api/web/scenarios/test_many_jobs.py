"""Size and time of every page with 10,000 jobs stored."""

import asyncio
import shutil
import time
from datetime import UTC, datetime

import httpx
import pytest
from sqlalchemy import update

from service.domain.jobs import JobState
from service.store.comparisons import ComparisonStore
from service.store.database import Database
from service.store.tables import jobs
from tests.service.api.serving import TOKEN, serving_elsewhere
from tests.service.examples import make_comparison, make_job
from trainer.jobspec import LOG_FILE

pytestmark = pytest.mark.timed

MAX_SECONDS, MAX_BYTES = 0.1, 100_000
JOBS, WAITING, JOBS_PER_COMPARISON = 10_000, 300, 100
REQUESTS = 20
PATHS = [
    "/",
    "/jobs",
    "/jobs?state=succeeded",
    "/jobs?state=failed",
    "/jobs?tag=nightly&norm=sync",
    "/jobs/{job}",
    "/jobs/{job}/logs",
    "/comparisons/{comparison}",
    "/submit",
    "/submit?recipe=lr-sweep&preset=paper",
    "/cluster",
    "/settings",
    "/sign-in",
]


async def store_jobs(path):
    """Store the jobs, of which the oldest have ended; return the ids of one and its comparison."""
    database = Database(f"sqlite+aiosqlite:///{path}", 60)
    store, now = ComparisonStore(database), datetime.now(UTC)
    for number in range(JOBS // JOBS_PER_COMPARISON):
        comparison = make_comparison(name=f"comparison {number}")
        points = [
            make_job(
                name=f"norm=sync seed={seed}",
                comparison_id=comparison.id,
                tags=("nightly", f"number:{number}"),
            )
            for seed in range(JOBS_PER_COMPARISON)
        ]
        await store.add(comparison, points)
    has_ended = jobs.c.sequence <= JOBS - WAITING
    async with database.write() as connection:
        ended = {"ended_at": now, "started_at": now, "mlflow_closed": True}
        await connection.execute(
            update(jobs).where(has_ended).values(state=JobState.SUCCEEDED.value, **ended)
        )
        some = has_ended & (jobs.c.sequence % 10 == 0)
        await connection.execute(update(jobs).where(some).values(state=JobState.FAILED.value))
    await database.close()
    return points[0].id, comparison.id


@pytest.fixture(scope="module")
def service(tmp_path_factory, sqlite_template):
    folder = tmp_path_factory.mktemp("many")
    shutil.copy(sqlite_template, folder / "test.db")
    job_id, comparison_id = asyncio.run(store_jobs(folder / "test.db"))
    log = folder / "storage" / job_id / "attempt-1" / LOG_FILE
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"2026-03-02 09:30:00 INFO step {step} loss 0.25\n" for step in range(100_000)))
    with serving_elsewhere(folder) as url, httpx.Client(base_url=url, timeout=60) as browser:
        browser.post("/sign-in", data={"token": TOKEN}, headers={"Origin": url})
        yield browser, {"job": job_id, "comparison": comparison_id}


def measure(browser, path):
    began = time.perf_counter()
    answer = browser.get(path)
    return time.perf_counter() - began, answer


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_small_and_fast(service, path):
    browser, ids = service
    path = path.format(**ids)
    _, answer = measure(browser, path)  # the first request reads recipes and compiles the template
    assert answer.status_code in (200, 303)
    assert len(answer.content) < MAX_BYTES
    # The fastest one, since other processes of the tests use the same cores.
    seconds = min(measure(browser, path)[0] for _ in range(REQUESTS))
    assert seconds < MAX_SECONDS
