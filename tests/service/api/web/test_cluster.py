import asyncio
import re
from datetime import UTC, datetime, timedelta

from service.domain.jobs import JobState, Transition
from service.domain.resources import Resources
from tests.service.api.web.conftest import SPEC
from tests.service.examples import make_job


async def test_the_page_shows_resources_nodes_and_jobs(browser, ray, submit):
    ray.total, ray.free, ray.largest_node_bytes = Resources(8, 2), Resources(5, 1), 16_000_000_000
    await submit()
    page = (await browser.get("/cluster")).text
    assert "<dt>CPUs free of 8</dt><dd>5</dd>" in page
    assert "<dt>GPUs free of 2</dt><dd>1</dd>" in page
    assert '<th scope="row" class="mono">127.0.0.1</th>' in page
    assert "16.0 GB" in page


async def test_the_queue_has_the_reason_why_each_job_waits(browser, browse, ray, submit):
    ray.total = Resources(1, 0)
    job_id = await submit("large one", spec=SPEC | {"num_workers": 4})
    async with asyncio.timeout(10):
        while "needs 4 CPUs, but the whole cluster has 1 CPUs" not in (
            page := (await browser.get("/cluster")).text
        ):
            await asyncio.sleep(0.05)
    assert f'href="/jobs/{job_id}">large one</a>' in page
    bob = await browse("bob")
    assert "large one" not in (await bob.get("/cluster")).text


async def test_usage_is_shown_by_owner_and_to_others_only_their_own(browser, browse, app, ray, submit):
    ray.is_down = True  # jobs change only by what follows
    job_id = await submit("trained")
    jobs = app.state.components.jobs
    for state in (JobState.SUBMITTED, JobState.RUNNING, JobState.SUCCEEDED):
        while not (found := await jobs.get(job_id)).state.is_terminal and found.state != state:
            await jobs.advance(found, Transition(state=state, reason="x"), "test")
    assert '<th scope="row">admin</th>' in (await browser.get("/cluster")).text
    bob = await browse("bob")
    assert "No attempt has run" in (await bob.get("/cluster")).text


async def test_the_page_does_without_ray(browser, ray):
    ray.is_down = True
    page = await browser.get("/cluster")
    assert page.status_code == 200
    assert "Ray does not answer" in page.text


async def test_the_queue_begins_with_the_jobs_that_are_admitted_first(browser, app, ray, monkeypatch):
    monkeypatch.setattr("service.api.web.cluster.MAX_WAITING", 4)
    ray.total = Resources(0, 0)
    now, jobs = datetime.now(UTC), app.state.components.jobs
    changes = {
        "starving": {"queued_at": now - timedelta(days=2), "priority": -5},
        "oldest": {"queued_at": now - timedelta(minutes=3)},
        "second": {"queued_at": now - timedelta(minutes=2)},
        "urgent": {"queued_at": now - timedelta(minutes=1), "priority": 5},
        **{f"late{number}": {"queued_at": now} for number in range(5)},
    }
    for name, values in changes.items():
        await jobs.add(make_job(name=name, **values))
    page = (await browser.get("/cluster")).text
    names = re.findall(r'<a id="job-[0-9a-f]+" href="[^"]+">([^<]+)</a>', page)
    assert names == ["starving", "urgent", "oldest", "second"]
    assert "All waiting jobs" in page
