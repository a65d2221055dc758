import asyncio

import pytest
from sqlalchemy import update

from service.store import tables
from tests.service.domain.recipe_factory import FASTER

SPEC = {"steps": 2000, "num_workers": 2, "eval_every": 100}
BODY = {
    "name": "does BN help",
    "spec": SPEC,
    "matrix": {"norm": ["none", "sync"], "seed": [0, 1, 2]},
    "target": 0.8,
}


async def test_a_comparison_is_one_job_per_point(client, mlflow):
    answer = await client.post("/v1/comparisons", json=BODY)
    comparison = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/comparisons/{comparison['id']}"
    assert [job["name"] for job in comparison["jobs"]] == [
        f"norm={norm} seed={seed}" for norm in ("none", "sync") for seed in (0, 1, 2)
    ]
    assert comparison["baseline"] == {"norm": "none"}
    async with asyncio.timeout(10):
        while (seen := (await client.get(f"/v1/comparisons/{comparison['id']}")).json())["jobs"][0][
            "state"
        ] != "submitted":
            await asyncio.sleep(0.01)
    assert seen["mlflow_url"] == (
        "http://syncbn.example/mlflow/#/experiments/1/runs?workflowType=machine_learning"
        f"&viewStateShareKey={comparison['id']}&compareRunsMode=CHART"
    )
    assert seen["jobs"][0]["comparison_id"] == comparison["id"]


async def test_the_report_compares_metrics_from_mlflow(client, app, ray, mlflow):
    ray.is_down = True  # jobs change only by what follows
    comparison = (await client.post("/v1/comparisons", json=BODY)).json()
    jobs = app.state.components.jobs
    for job, steps in zip(comparison["jobs"], (1000, 1600, 1300, 100, 100, 100), strict=True):
        run_id = f"run-of-{job['id']}"
        mlflow.curves[run_id, "accuracy"] = [(0, 0.1), (steps - 10, 0.5), (steps, 0.85), (2000, 0.9)]
        async with asyncio.timeout(10):
            while await jobs.update_fields(await jobs.get(job["id"]), mlflow_run_id=run_id) is None:
                await asyncio.sleep(0.01)
    report = (await client.get(f"/v1/comparisons/{comparison['id']}/report?curves=true")).json()
    none, sync = report["variants"]
    assert (none["verdict"], none["ratio"], none["steps_to_target"]["median"]) == ("baseline", None, 1300)
    assert (sync["verdict"], sync["ratio"]) == ("faster", {"median": 13.0, "low": 10.0, "high": 16.0})
    assert sync["n"] == sync["reached"] == 3
    assert sync["curves"][0]["points"] == [[0, 0.1], [90, 0.5], [100, 0.85], [2000, 0.9]]
    assert not report["finished"]
    assert report["target_is_given"]
    assert (await client.get(f"/v1/comparisons/{comparison['id']}/report")).json()["variants"][0][
        "curves"
    ] is None


@pytest.mark.parametrize(("metric", "taken"), [("test_loss", True), ("accuracy", True), ("auroc", False)])
async def test_a_comparison_accepts_metrics_of_its_runs(client, metric, taken):
    answer = await client.post("/v1/comparisons:validate", json=BODY | {"metric": metric, "target": None})
    assert answer.status_code == (200 if taken else 422)
    assert taken or "must be test_loss or one of the spec's evaluation.metrics" in answer.text


async def test_any_metric_of_all_runs_can_be_read(client, app, mlflow):
    comparison = (await client.post("/v1/comparisons", json=BODY)).json()
    jobs, job = app.state.components.jobs, comparison["jobs"][0]
    mlflow.curves[f"run-of-{job['id']}", "probe/loss_range"] = [(0, 0.4), (100, 0.1)]
    async with asyncio.timeout(10):
        while (await jobs.get(job["id"])).mlflow_run_id is None:
            await asyncio.sleep(0.01)
    address = f"/v1/comparisons/{comparison['id']}/curves"
    curves = (await client.get(address, params={"metric": "probe/loss_range"})).json()
    assert curves["metric"] == "probe/loss_range"
    assert [(run["job_id"], run["seed"], run["points"]) for run in curves["runs"]] == [
        (other["id"], other["seed"], [[0, 0.4], [100, 0.1]] if other == job else [])
        for other in comparison["jobs"]
    ]
    assert (await client.get(address.replace(comparison["id"], "comparison-0"))).status_code == 404


async def test_each_named_variant_is_a_job(client):
    variants = {"plain": {"norm": "none"}, "bn-x5": {"norm": "sync", "optimizer.lr": 0.5}}
    body = BODY | {"variants": variants, "matrix": {"seed": [0, 1]}, "baseline": {"variant": "plain"}}
    comparison = (await client.post("/v1/comparisons", json=body)).json()
    assert comparison["matrix"] == {"variant": ["plain", "bn-x5"], "seed": [0, 1]}
    assert [job["name"] for job in comparison["jobs"]][1:3] == [
        "variant=plain seed=1",
        "variant=bn-x5 seed=0",
    ]
    job = (await client.get(f"/v1/jobs/{comparison['jobs'][2]['id']}")).json()
    assert job["spec"]["optimizer"]["lr"] == 0.5


async def test_a_report_without_mlflow_is_503_with_retry_after(client, app, mlflow):
    comparison = (await client.post("/v1/comparisons", json=BODY)).json()
    async with asyncio.timeout(10):
        while not (await app.state.components.jobs.get(comparison["jobs"][0]["id"])).mlflow_run_id:
            await asyncio.sleep(0.01)
    mlflow.is_down = True
    answer = await client.get(f"/v1/comparisons/{comparison['id']}/report")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


async def test_an_invalid_matrix_is_named_and_nothing_is_stored(client):
    for change, field in [
        ({"matrix": {"optimizer.lr": [0.1, -1]}}, "matrix.optimizer.lr[1]"),
        ({"matrix": {"lr": [0.1]}}, "matrix.lr"),
        ({"matrix": {}}, "matrix"),
        ({"matrix": {"seed": []}}, "matrix.seed"),
        ({"baseline": {"norm": "group"}}, "baseline.norm"),
        ({"spec": SPEC | {"steps": 0}}, "spec.steps"),
        ({"target": "high"}, "target"),
        ({"metric": "acuracy"}, "metric"),
    ]:
        answer = await client.post("/v1/comparisons", json=BODY | change)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == field
    assert (await client.get("/v1/jobs")).json()["jobs"] == []


async def test_a_comparison_over_gradient_accumulation_has_a_warning(client):
    matrix = {"gradient_accumulation_steps": [1, 2, 8], "seed": [0, 1]}
    found = (await client.post("/v1/comparisons:validate", json=BODY | {"matrix": matrix})).json()["warnings"]
    assert len(found) == len(set(found)) == 3
    assert (
        "gradient_accumulation_steps: the variants take statistics of parts of different sizes" in found[-1]
    )
    assert found[-1].endswith("(got 1, 2, 8)")
    fixed = BODY | {"spec": SPEC | {"norm": "group"}, "matrix": matrix}
    assert (await client.post("/v1/comparisons:validate", json=fixed)).json()["warnings"] == []


async def test_a_report_repeats_the_warnings(client):
    body = BODY | {"matrix": {"gradient_accumulation_steps": [1, 2]}}
    comparison = (await client.post("/v1/comparisons", json=body)).json()
    report = (await client.get(f"/v1/comparisons/{comparison['id']}/report")).json()
    assert any("parts of different sizes" in warning for warning in report["warnings"])


RECIPE = {
    "claim": "It learns faster.",
    "source": "a paper",
    "paper": "14 times",
    "falsified_if": "not five times fewer steps",
    "verdict": [FASTER],
}


async def test_the_verdict_uses_only_succeeded_runs(client, app, ray, mlflow):
    ray.is_down = True
    comparison = (await client.post("/v1/comparisons", json=BODY | {"recipe": RECIPE})).json()
    address = f"/v1/comparisons/{comparison['id']}/verdict"
    assert (await client.get(address)).json()["judgement"] == "not enough data"
    components = app.state.components
    for job, steps in zip(comparison["jobs"], (1000, 1600, 1300, 100, 100, 100), strict=True):
        run_id = f"run-of-{job['id']}"
        mlflow.curves[run_id, "accuracy"] = [(0, 0.1), (steps - 10, 0.5), (steps, 0.85)]
        async with components.database.write() as connection:
            changes = {"state": "succeeded", "mlflow_run_id": run_id, "mlflow_closed": True}
            await connection.execute(
                update(tables.jobs).where(tables.jobs.c.id == job["id"]).values(**changes)
            )
    verdict = (await client.get(address)).json()
    [finding] = verdict["findings"]
    assert (verdict["judgement"], verdict["claim"]) == ("holds", "It learns faster.")
    assert [value["number"] for value in finding["values"]] == [
        {"low": ratio, "high": ratio} for ratio in (10.0, 16.0, 13.0)
    ]
    assert finding["figure"]["bound"] == 5
    assert 5 < finding["interval"]["low"] < 13 < finding["interval"]["high"]
    shown = (await client.get(f"/v1/comparisons/{comparison['id']}")).json()
    assert shown["recipe"]["verdict"][0]["label"] == FASTER["label"]


async def test_a_comparison_without_a_recipe_has_no_verdict(client):
    comparison = (await client.post("/v1/comparisons", json=BODY)).json()
    answer = await client.get(f"/v1/comparisons/{comparison['id']}/verdict")
    assert answer.status_code == 409
    assert "has no recipe" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "field", "rule"),
    [
        ({"verdict": [FASTER] * 17}, "recipe.verdict", "at most 16 items"),
        ({"verdict": [FASTER | {"label": "x" * 301}]}, "recipe.verdict[0].label", "at most 300 characters"),
        ({"verdict": [FASTER | {"by": "value"}]}, "recipe.verdict[0]", "by value"),
        (
            {
                "figures": [
                    FASTER | {"measure": {"take": "final", "metric": f"m{n}", "minus": f"n{n}"}}
                    for n in range(16)
                ]
            },
            "recipe.figures[0].relation",
            "no such field",
        ),
        (
            {
                "verdict": [
                    FASTER | {"measure": {"take": "final", "metric": f"m{n}", "minus": f"n{n}"}}
                    for n in range(16)
                ]
            },
            "recipe",
            "at most 16 metrics",
        ),
        ({"verdict": [FASTER | {"of": {"norm": "x" * 20_000}}]}, "recipe", "at most 16,384 bytes"),
    ],
)
async def test_the_size_of_a_recipe_is_limited(client, change, field, rule):
    answer = await client.post("/v1/comparisons", json=BODY | {"recipe": RECIPE | change})
    assert answer.status_code == 422
    error = answer.json()["errors"][0]
    assert (error["field"], rule in error["message"]) == (field, True), error


async def test_comparisons_are_listed_newest_first_and_only_to_their_owner(client, as_owner):
    ann, bob = await as_owner("ann"), await as_owner("bob")
    ids = [(await each.post("/v1/comparisons", json=BODY)).json()["id"] for each in (ann, bob, ann)]
    first = (await client.get("/v1/comparisons", params={"page_size": 2})).json()
    assert [each["id"] for each in first["comparisons"]] == [ids[2], ids[1]]
    assert sum(first["comparisons"][0]["jobs"].values()) == 6
    token = first["next_page_token"]
    last = (await client.get("/v1/comparisons", params={"page_token": token})).json()
    assert ([each["id"] for each in last["comparisons"]], last["next_page_token"]) == ([ids[0]], None)
    mine = (await ann.get("/v1/comparisons")).json()["comparisons"]
    assert [each["id"] for each in mine] == [ids[2], ids[0]]
    assert (await ann.get("/v1/comparisons?owner=bob")).json()["comparisons"] == []
    of_bob = (await client.get("/v1/comparisons?owner=bob")).json()["comparisons"]
    assert [each["id"] for each in of_bob] == [ids[1]]
