import asyncio
import re

from tests.service.api.web.conftest import SPEC

BODY = {"name": "does BN help", "spec": SPEC, "matrix": {"norm": ["none", "sync"], "seed": [0, 1]}}


async def test_the_overview_shows_the_newest_comparisons_and_jobs(browser, client, submit):
    assert "There is no comparison yet" in (await browser.get("/")).text
    job_id = await submit("single job")
    comparison = (await client.post("/v1/comparisons", json=BODY)).json()
    page = (await browser.get("/")).text
    assert f'href="/comparisons/{comparison["id"]}">does BN help</a>' in page
    assert "2 norm × 2 seed" in page
    assert "0 of 4" in page
    assert f'href="/jobs/{job_id}">single job</a>' in page


async def test_owners_see_only_their_jobs_and_comparisons(browse, client, as_owner):
    ann = await as_owner("ann")
    job_id = (await ann.post("/v1/jobs", json={"name": "of ann", "spec": SPEC})).json()["id"]
    await ann.post("/v1/comparisons", json=BODY | {"name": "compared by ann"})
    bob, own = await browse("bob"), await browse("ann")
    for path in ("/", "/jobs", "/jobs?owner=ann"):
        page = (await bob.get(path)).text
        assert "of ann" not in page
        assert "compared by ann" not in page
    assert "of ann" in (await own.get("/jobs")).text
    assert (await bob.get(f"/jobs/{job_id}")).status_code == 404


async def test_filters_are_in_the_address_and_empty_ones_do_not_count(browser, submit):
    await submit("tagged", tags=["nightly"])
    await submit("plain", spec=SPEC | {"norm": "none"})
    page = (await browser.get("/jobs?state=&tag=nightly&norm=&owner=&comparison=")).text
    assert ("tagged</a>" in page, "plain</a>" in page) == (True, False)
    assert 'name="tag" value="nightly"' in page
    page = (await browser.get("/jobs?norm=none&state=queued")).text
    assert ("tagged</a>" in page, "plain</a>" in page) == (False, True)
    assert "<option selected>none</option>" in page


async def test_pages_of_the_list_keep_the_filters(browser, submit, monkeypatch):
    monkeypatch.setattr("service.api.web.jobs.PAGE_SIZE", 2)
    for index in range(5):
        await submit(f"number {index}", tags=["nightly"])
    seen, path = [], "/jobs?tag=nightly"
    while path:
        page = (await browser.get(path)).text
        seen += re.findall(r">(number \d)</a>", page)
        more = re.search(r'<a rel="next" href="([^"]+)"', page)
        path = more and more[1].replace("&amp;", "&")
        assert path is None or path.startswith("/jobs?tag=nightly&page_token=")
    assert seen == [f"number {index}" for index in (4, 3, 2, 1, 0)]


async def test_a_list_is_polled_only_while_a_job_of_it_is_open(browser, submit, client):
    job_id = await submit(tags=["nightly"])
    page = (await browser.get("/jobs?tag=nightly")).text
    assert 'id="live" hx-get="/jobs?tag=nightly" hx-select="#live"' in page
    await browser.post(f"/jobs/{job_id}/cancel")
    async with asyncio.timeout(10):
        while (await client.get(f"/v1/jobs/{job_id}")).json()["state"] != "cancelled":
            await asyncio.sleep(0.05)
    assert "hx-get" not in (await browser.get("/jobs?tag=nightly")).text
