import asyncio
import re

import pytest

from service.api.web.job import curve_table, differences
from tests.service.api.web.conftest import SPEC
from trainer.jobspec import JobSpec


async def test_a_job_shows_its_timeline_spec_and_actions(browser, submit):
    job_id = await submit("mine", tags=["nightly"])
    page = (await browser.get(f"/jobs/{job_id}")).text
    assert "submitted by the user" in page
    assert "hidden: [8]" in page
    assert "There is no measurement yet" in page
    assert f'formaction="/jobs/{job_id}/cancel"' in page
    assert 'hx-trigger="every 2s"' in page


async def test_cancelling_by_the_button(browser, submit, client):
    job_id = await submit()
    answer = await browser.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job_id}")
    async with asyncio.timeout(10):
        while (await client.get(f"/v1/jobs/{job_id}")).json()["state"] != "cancelled":
            await asyncio.sleep(0.02)
    page = (await browser.get(f"/jobs/{job_id}")).text
    assert "/cancel" not in page
    assert f'formaction="/jobs/{job_id}/resume"' in page
    assert "hx-get" not in page  # nothing changes any more


async def test_pausing_and_resuming_by_the_buttons(browser, submit, ray):
    ray.is_down = True  # it stays in the queue
    job_id = await submit()
    answer = await browser.post(f"/jobs/{job_id}/pause")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job_id}")
    page = (await browser.get(f"/jobs/{job_id}")).text
    assert "Paused." in page
    assert f"/jobs/{job_id}/pause" not in page
    assert f'formaction="/jobs/{job_id}/resume"' in page
    assert "paused" in (await browser.get("/jobs")).text
    answer = await browser.post(f"/jobs/{job_id}/resume", data={})
    assert (answer.status_code, answer.headers["location"]) == (303, f"/jobs/{job_id}")
    page = (await browser.get(f"/jobs/{job_id}")).text
    assert f'formaction="/jobs/{job_id}/pause"' in page


async def test_a_clone_shows_its_differences_to_its_parent(browser, submit, client):
    job_id = await submit()
    form = {"name": "faster", "overrides": "optimizer.lr: 0.5\nsteps: 20"}
    made = await browser.post(f"/jobs/{job_id}/clone", data=form)
    assert made.status_code == 303
    page = (await browser.get(made.headers["location"])).text
    assert f"Differences to {job_id}" in page
    assert "<code>optimizer.lr</code></th><td>0.1</td><td>0.5</td>" in page
    assert "<code>steps</code></th><td>10</td><td>20</td>" in page
    equal = await browser.post(f"/jobs/{job_id}/clone", data={"name": "", "overrides": ""})
    assert "The resolved specs are equal" in (await browser.get(equal.headers["location"])).text


async def test_a_clone_of_a_job_of_another_owner_does_not_show_it(browse, client, submit):
    job_id = await submit()
    ann = await browse("ann")
    assert (await ann.post(f"/jobs/{job_id}/clone", data={})).status_code == 404


@pytest.mark.parametrize(
    ("form", "status", "text"),
    [
        ({"overrides": "optimizer.lr: -1"}, 422, "overrides.optimizer.lr"),
        ({"overrides": "nothing: 1"}, 422, "must be a path into the spec"),
        ({"overrides": "["}, 422, "overrides: must be valid YAML"),
        ({"overrides": "steps: &x [*x]"}, 422, "overrides.steps"),
        ({"overrides": "- 1"}, 422, "overrides: must be a mapping"),
        ({"name": "<b>"}, 422, "name"),
    ],
)
async def test_a_wrong_change_is_named_and_submits_nothing(browser, submit, client, form, status, text):
    job_id = await submit()
    answer = await browser.post(f"/jobs/{job_id}/clone", data=form)
    assert answer.status_code == status
    assert text in answer.text
    assert len((await client.get("/v1/jobs")).json()["jobs"]) == 1


async def test_an_open_job_cannot_be_resumed(browser, submit):
    answer = await browser.post(f"/jobs/{await submit()}/resume", data={})
    assert answer.status_code == 409
    assert "only jobs that are paused or have ended can be resumed" in answer.text


async def test_curves_come_from_mlflow_and_the_page_does_without(browser, submit, app, ray, mlflow):
    ray.is_down = True  # it stays in the queue
    job_id = await submit()
    jobs = app.state.components.jobs
    while (
        await jobs.update_fields(await jobs.get(job_id), mlflow_run_id="run", mlflow_experiment_id="1")
        is None
    ):
        pass
    mlflow.curves["run", "accuracy"] = [(0, 0.1), (10, 0.9)]
    mlflow.curves["run", "test_loss"] = [(10, float("inf"))]
    page = (await browser.get(f"/jobs/{job_id}")).text
    assert '<th scope="row" class="n">10</th><td class="n">0.9</td><td class="n">∞</td>' in page
    assert re.search(r'href="/mlflow/[^"]*run[^"]*">MLflow run', page)
    drawn = (await browser.get(f"/jobs/{job_id}/curves.json?metric=accuracy")).json()
    assert (drawn["x"], drawn["bands"][0]["mean"]) == ([0, 10], [0.1, 0.9])
    assert (await browser.get(f"/jobs/{job_id}/curves.json?metric=nothing")).json()["x"] == []
    mlflow.is_down = True
    page = await browser.get(f"/jobs/{job_id}")
    assert page.status_code == 200
    assert "MLflow does not answer" in page.text
    mlflow.is_down = False
    poll = await browser.get(f"/jobs/{job_id}", headers={"HX-Request": "true", "HX-Target": "live"})
    assert "There is no measurement yet" in poll.text  # not asked for: the poll replaces only the state


def test_a_table_of_curves_keeps_its_first_and_last_step():
    table = curve_table({"a": [(step, step / 10) for step in range(1_000)], "b": [(999, 1.0)]})
    assert len(table) == 12
    assert (table[0], table[-1]) == ((0, [0.0, None]), (999, [99.9, 1.0]))


def test_differences_are_those_of_resolved_specs():
    before = JobSpec.model_validate(SPEC)
    after = JobSpec.model_validate(SPEC | {"model": {"name": "cnn", "channels": [4]}, "norm": "sync"})
    paths = {each.path: (each.before, each.after) for each in differences(before, after)}
    assert paths["model.name"] == ("mlp", "cnn")
    assert paths["model.hidden"] == ([8], None)
    assert "norm" not in paths  # the default


async def test_a_job_of_several_workers_shows_warnings_and_advice(browser, submit, mlflow):
    job_id = await submit(spec=SPEC | {"num_workers": 4, "global_batch_size": 8, "norm": "batch"})
    page = (await browser.get(f"/jobs/{job_id}")).text
    assert "norm: statistics are of 2 samples" in page
    assert "<strong>Synchronise:</strong> norm1 has 2 effective values per channel and worker" in page
    assert "4 of 4 workers" in page
    assert "not measured; the probe" in page
    alone = await submit()
    assert "Synchronised statistics" not in (await browser.get(f"/jobs/{alone}")).text


async def test_without_mlflow_a_job_has_no_advice(browser, submit, mlflow, client):
    job_id = await submit(spec=SPEC | {"num_workers": 2})
    async with asyncio.timeout(10):
        while (await client.get(f"/v1/jobs/{job_id}")).json()["mlflow_run_id"] is None:
            await asyncio.sleep(0.02)
    mlflow.is_down = True
    page = await browser.get(f"/jobs/{job_id}")
    assert page.status_code == 200
    assert "Synchronised statistics" not in page.text
