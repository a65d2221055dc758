import asyncio
import re

import pytest

from service.domain.jobs import JobState, Transition
from trainer.jobspec import Progress

FORM = {"view": "form", "name": "mine", "spec.steps": "10", "spec.data.name": "digits"}
MATRIX = {
    "matrix.0.path": "norm",
    "matrix.0.values": "none, sync",
    "matrix.1.path": "seed",
    "matrix.1.values": "0, 1, 2",
}


async def send(browser, action, form):
    return await browser.post("/submit", data={"action": action, **form})


def facts(page):
    return dict(re.findall(r"<div><dt>([^<]+)</dt><dd>([^<]+)</dd></div>", page))


async def test_the_page_has_the_recipes_and_a_form(browser):
    page = (await browser.get("/submit")).text
    assert "demo: 6 runs of fig1-activations" in page
    assert "demo: 6 runs" in page
    assert 'name="spec.global_batch_size" value=""' in page.replace("\n", " ")


async def test_a_recipe_is_submitted_with_one_click(browser, client):
    made = await browser.post("/submit/recipe", data={"recipe": "fig1-activations", "preset": "demo"})
    assert made.status_code == 303
    found = (await client.get("/v1" + made.headers["location"])).json()
    assert (found["name"], len(found["jobs"])) == ("fig1-activations", 6)
    unknown = await browser.post("/submit/recipe", data={"recipe": "../x", "preset": "demo"})
    assert unknown.status_code == 404


async def test_a_job_and_a_comparison_are_submitted_by_the_form(browser, client):
    job = await send(browser, "submit", FORM)
    assert (await client.get("/v1" + job.headers["location"])).json()["steps"] == 10
    comparison = await send(browser, "submit", FORM | MATRIX)
    assert len((await client.get("/v1" + comparison.headers["location"])).json()["jobs"]) == 6


async def test_a_check_shows_the_runs_and_what_they_need(browser, client):
    page = (await send(browser, "check", FORM | MATRIX)).text
    assert facts(page) == {
        "runs": "6",
        "each needs": "1 CPUs",
        "the cluster is": "large enough",
        "estimated per run": "not known",
    }
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_a_check_estimates_by_similar_jobs_that_have_ended(browser, client, app, ray):
    ray.is_down = True  # jobs change only by what follows
    job = (await send(browser, "submit", FORM)).headers["location"].removeprefix("/jobs/")
    jobs = app.state.components.jobs
    progress = Progress(step=10, total_steps=10, samples_per_second=60, eta_seconds=0)
    while await jobs.update_fields(await jobs.get(job), progress=progress) is None:
        pass
    for state in (JobState.SUBMITTED, JobState.RUNNING, JobState.SUCCEEDED):
        while (found := await jobs.get(job)).state.value != state.value and not found.state.is_terminal:
            await jobs.advance(found, Transition(state=state, reason="x"), "test")
    page = (await send(browser, "check", FORM | MATRIX)).text
    assert facts(page)["estimated per run"] == "10 s"  # 10 steps of 60 samples, at 60 per second
    assert facts(page)["in all, one at a time"] == "1 min"


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        ({"spec.steps": "0"}, "spec.steps", "greater than or equal to 1"),
        ({"spec.steps": "<b>"}, "spec.steps", "valid integer"),
        ({"name": "<script>"}, "name", "String should match pattern"),
        (
            {"matrix.0.path": "nothing", "matrix.0.values": "1"},
            "matrix.nothing",
            "must be a path into the spec",
        ),
        ({"matrix.0.path": "norm", "matrix.0.values": "none, snc"}, "matrix.norm[1]", "Input should be"),
        ({"rest": "nothing: 1"}, "nothing", "there is no such field"),
        ({"spec.model.name": "cnn", "spec.model.channels": "[0]"}, "spec.model.channels[0]", "greater than"),
    ],
)
async def test_an_error_is_shown_with_its_field_and_the_form_stays(browser, client, change, field, text):
    checked = await send(browser, "check", FORM | change)
    refused = await send(browser, "submit", FORM | change)
    assert (checked.status_code, refused.status_code) == (200, 422)
    for page in (checked.text, refused.text):
        assert f"<code>{field}</code>" in page
        assert text in page
        assert "<script>" not in page.partition("<main")[2].partition("</main>")[0]
    if (name := field.partition("[")[0]).startswith(("spec.", "matrix.norm")):
        assert f'<p class="error" id="error-{name}">' in refused.text
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_the_form_and_yaml_show_the_same_draft(browser, client):
    page = (await send(browser, "as_yaml", FORM | MATRIX)).text
    text = re.search(r'<textarea id="yaml"[^>]*>(.*?)</textarea>', page, re.DOTALL)[1]
    assert "matrix:\n  norm: [none, sync]\n  seed: [0, 1, 2]" in text
    form = (await send(browser, "as_form", {"view": "yaml", "yaml": text})).text
    assert 'value="none, sync"' in form
    made = await send(browser, "submit", {"view": "yaml", "yaml": text})
    assert len((await client.get("/v1" + made.headers["location"])).json()["jobs"]) == 6


async def test_another_kind_of_model_has_its_own_fields(browser):
    page = (await send(browser, "update", FORM | {"spec.model.name": "cnn", "spec.model.hidden": "[3]"})).text
    assert 'name="spec.model.channels"' in page
    assert 'name="spec.model.hidden"' not in page


async def test_a_form_is_filled_by_a_job_or_a_recipe(browser, submit):
    job_id = await submit("mine", tags=["a", "b"])
    page = (await browser.get(f"/submit?job={job_id}")).text
    assert 'value="a, b"' in page
    assert 'value="[8]"' in page
    page = (await browser.get("/submit?recipe=lr-sweep&preset=paper")).text
    assert 'value="lr-sweep"' in page
    assert (await browser.get("/submit?recipe=nothing")).status_code == 404


def key_of(page):
    (key,) = set(re.findall(r'name="key" value="([\w-]{20,})"', page.text))
    return key


@pytest.mark.parametrize("form", [FORM, FORM | MATRIX])
async def test_a_double_click_and_a_reload_submit_a_draft_once(browser, client, form):
    form = form | {"key": key_of(await browser.get("/submit"))}
    answers = await asyncio.gather(send(browser, "submit", form), send(browser, "submit", form))
    answers.append(await send(browser, "submit", form))
    assert [answer.status_code for answer in answers] == [303] * 3
    assert len({answer.headers["location"] for answer in answers}) == 1
    before = len((await client.get("/v1/jobs")).json()["jobs"])
    assert before == (6 if "matrix.0.path" in form else 1)
    # After going back: a changed draft, and one of another page.
    changed = await send(browser, "submit", form | {"spec.steps": "11"})
    fresh = await send(browser, "submit", form | {"key": key_of(await browser.get("/submit"))})
    assert len({answer.headers["location"] for answer in (answers[0], changed, fresh)}) == 3


async def test_a_recipe_is_submitted_once_per_page_and_a_refused_draft_may_be_sent_again(browser, client):
    key = key_of(await browser.get("/submit"))
    form = {"recipe": "fig1-activations", "preset": "demo", "key": key}
    answers = [await browser.post("/submit/recipe", data=form) for _ in range(2)]
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert len((await client.get("/v1/comparisons")).json()["comparisons"]) == 1
    refused = [await send(browser, "submit", FORM | {"spec.steps": "0", "key": key}) for _ in range(2)]
    assert [answer.status_code for answer in refused] == [422, 422]


async def test_submitting_needs_its_scope(browse):
    reader = await browse("ann", "read")
    assert (await reader.get("/submit")).status_code == 403
    assert (await send(reader, "submit", FORM)).status_code == 403
