import asyncio
import re

import pytest

from service.adapters.job_log import LogOffset
from service.api.web.logs import LogQuery, read_part
from trainer.jobspec import LOG_FILE, LOG_INDEX_FILE

MARKUP = "<script>alert('x')</script>"


@pytest.fixture
def write(app):
    """Append to the files of a job's log, as the driver does."""

    async def append(job_id, text, name=LOG_FILE):
        job = await app.state.components.jobs.get(job_id)
        folder = app.state.components.files.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(text)
        end = (folder / name).read_bytes().rfind(b"\n") + 1
        with (folder / LOG_INDEX_FILE).open("a") as index:
            index.write(f"{name} {end}\n")
        return folder

    return append


async def test_lines_have_their_rank_and_level_and_no_markup(browser, submit, write):
    job_id = await submit()
    await write(job_id, "INFO begins\n")
    await write(job_id, f"ValueError: {MARKUP}\n", "log-rank-00003.txt")
    page = (await browser.get(f"/jobs/{job_id}/logs")).text
    assert '<div class="info"><span>driver</span>INFO begins</div>' in page
    assert '<div class="error"><span>rank 3</span>ValueError: &lt;script&gt;' in page
    assert MARKUP not in page


async def test_lines_are_filtered_by_rank_level_and_text(browser, submit, write):
    job_id = await submit()
    await write(job_id, "INFO one\nWARNING two\n")
    await write(job_id, "INFO Three\nERROR four\n", "log-rank-00001.txt")

    async def shown(query):
        return re.findall(r"</span>\w+ (\w+)</div>", (await browser.get(f"/jobs/{job_id}/logs?{query}")).text)

    assert await shown("rank=&level=&search=") == ["one", "two", "Three", "four"]
    assert await shown("rank=1") == ["Three", "four"]
    assert await shown("level=warning") == ["two", "four"]
    assert await shown("search=three") == ["Three"]
    assert (await browser.get(f"/jobs/{job_id}/logs?attempt=2")).status_code == 422


async def test_a_poll_gets_what_follows_and_an_overwritten_line_once(browser, submit, write):
    job_id = await submit()
    await write(job_id, "INFO one\n")
    await write(job_id, "1 of 9\r2 of 9", "log-rank-00000.txt")
    page = (await browser.get(f"/jobs/{job_id}/logs")).text
    assert "<span>rank 0</span>2 of 9</div>" in page
    assert "1 of 9" not in page
    following = re.search(r'hx-get="([^"]+)"', page)[1].replace("&amp;", "&")
    await write(job_id, "\r3 of 9\n", "log-rank-00000.txt")
    await write(job_id, "INFO two\n")
    part = (await browser.get(following)).text
    assert "<html" not in part
    assert re.findall(r"</span>([^<]+)</div>", part) == ["3 of 9", "INFO two"]


async def test_a_whole_log_is_downloaded_as_text(browser, submit, write):
    job_id = await submit()
    await write(job_id, f"{MARKUP}\n")
    answer = await browser.get(f"/jobs/{job_id}/logs.txt")
    assert (answer.text, answer.headers["content-type"]) == (f"{MARKUP}\n", "text/plain; charset=utf-8")


async def test_without_a_log_of_the_driver_the_one_of_ray_is_shown(browser, submit, ray):
    job_id = await submit()
    ray.is_down = True
    page = (await browser.get(f"/jobs/{job_id}/logs")).text
    assert "The driver has not written a log" not in page
    ray.is_down = False
    async with asyncio.timeout(10):
        while f"log of {job_id}-a1" not in (page := (await browser.get(f"/jobs/{job_id}/logs")).text):
            await asyncio.sleep(0.05)
    assert "The driver has not written a log" in page


async def test_a_long_log_is_shown_from_near_its_end(submit, write, monkeypatch):
    folder = await write(await submit(), "".join(f"INFO line {number}\n" for number in range(5_000)))
    monkeypatch.setattr("service.api.web.logs.TAIL_BYTES", 1_005)
    part = read_part(folder, 1, None, LogQuery(), is_over=True)
    assert part.lines[-1].text == "INFO line 4999"
    assert all(re.fullmatch(r"INFO line \d{4}", line.text) for line in part.lines)  # none is cut
    assert part.has_more_before
    found = read_part(folder, 1, None, LogQuery(search="line 77"), is_over=True)
    assert found.lines[0].text == "INFO line 77"
    monkeypatch.setattr("service.api.web.logs.SEARCHED_BYTES", 1_005)
    late = read_part(folder, 1, LogOffset(1, 10), LogQuery(), is_over=True)  # as much as a page may ask for
    assert [line.text for line in late.lines] == [line.text for line in part.lines]
    long = read_part(await _long(write, folder), 1, None, LogQuery(), is_over=True)
    assert sum(min(len(line.text), 2_000) for line in long.lines) < 60_000


async def _long(write, folder):
    (folder / LOG_FILE).write_text(f"{'x' * 30_000}\n" * 100)
    (folder / LOG_INDEX_FILE).write_text("")
    return folder
