import asyncio
import re

import pytest

from service.domain.lifecycle import RayStatus

VALUE = "hf_a-secret-value"
BODY = {"name": "mine", "spec": {"steps": 10, "num_workers": 2}}


@pytest.fixture
def secrets(tmp_path):
    folder = tmp_path / "secrets"
    for name in ("ann/hf-token", "bob/key", "shared/data-key"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(VALUE + "\n")
    (tmp_path / "outside").write_text(VALUE)
    (folder / "ann" / "link").symlink_to(tmp_path / "outside")
    (folder / "ann" / "other").symlink_to(folder / "bob" / "key")
    return folder


async def until_submitted(client, ray, job):
    async with asyncio.timeout(10):
        while f"{job['id']}-a1" not in ray.tasks:
            await asyncio.sleep(0.01)
    return ray.tasks[f"{job['id']}-a1"][0]


async def test_only_names_of_secrets_are_stored_and_sent(as_owner, ray, tmp_path, secrets, caplog):
    ann = await as_owner("ann")
    asked = {"HF_TOKEN": "hf-token", "DATA_KEY": "shared/data-key"}
    answer = await ann.post("/v1/jobs", json=BODY | {"secrets": asked}, headers={"Idempotency-Key": "k"})
    job = answer.json()
    assert answer.status_code == 202
    assert job["secrets"] == {"HF_TOKEN": "ann/hf-token", "DATA_KEY": "shared/data-key"}
    task = await until_submitted(ann, ray, job)
    assert task.context.secrets == {
        "HF_TOKEN": f"{secrets}/ann/hf-token",
        "DATA_KEY": f"{secrets}/shared/data-key",
    }
    ray.set(f"{job['id']}-a1", RayStatus.RUNNING)
    seen = [await ann.get(f"/v1/jobs/{job['id']}{part}") for part in ("", "/events", "/logs")]
    assert VALUE not in "".join(each.text for each in (answer, *seen)) + task.model_dump_json() + caplog.text
    files = list(tmp_path.glob("test.db*"))
    assert b"hf-token" in b"".join(path.read_bytes() for path in files)
    assert VALUE.encode() not in b"".join(path.read_bytes() for path in files)


async def test_jobs_of_a_comparison_have_its_secrets(as_owner, secrets):
    ann = await as_owner("ann")
    body = BODY | {"matrix": {"seed": [0, 1]}, "secrets": {"HF_TOKEN": "ann/hf-token"}}
    comparison = (await ann.post("/v1/comparisons", json=body)).json()
    assert [job["secrets"] for job in comparison["jobs"]] == [{"HF_TOKEN": "ann/hf-token"}] * 2


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("bob/key", "must be one of ann/hf-token"),
        ("key", "shared/data-key"),
        ("nothing", "must be one of ann/hf-token"),
        ("shared/nothing", "must be one of"),
        ("link", "must be one of"),
        ("other", "must be one of"),
        ("../outside", "pattern"),
        ("ann/..", "pattern"),
        ("..", "pattern"),
        ("/etc/passwd", "pattern"),
        ("ann/../bob/key", "pattern"),
        (VALUE + "/" + VALUE, "must be one of"),
        ("", "pattern"),
    ],
)
async def test_secrets_of_other_owners_are_rejected_and_nothing_is_stored(as_owner, secrets, name, rule):
    ann = await as_owner("ann")
    for path, more in (("/v1/jobs", {}), ("/v1/comparisons", {"matrix": {"seed": [0, 1]}})):
        refused = await ann.post(path, json=BODY | {"secrets": {"HF_TOKEN": name}} | more)
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "secrets.HF_TOKEN")
        assert rule in refused.json()["errors"][0]["message"]
        assert not {"bob", "link", "other"} & set(re.split(r"[/, ]", refused.json()["errors"][0]["message"]))
    assert (await ann.get("/v1/jobs")).json()["jobs"] == []


@pytest.mark.parametrize(
    "variable", ["PATH", "LD_PRELOAD", "PYTHONPATH", "RAY_ADDRESS", "SYNCBN_JOB", "a b", "1A", ""]
)
async def test_variables_that_configure_the_worker_are_rejected(as_owner, secrets, variable):
    refused = await (await as_owner("ann")).post("/v1/jobs", json=BODY | {"secrets": {variable: "hf-token"}})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"].startswith("secrets")


async def test_without_a_secrets_folder_there_are_no_secrets(client):
    refused = await client.post("/v1/jobs", json=BODY | {"secrets": {"HF_TOKEN": "hf-token"}})
    assert "there are none" in refused.json()["errors"][0]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/jobs", "/v1/jobs:validate", "/v1/comparisons", "/v1/comparisons:validate"]
)
async def test_a_priority_above_that_of_its_owner_is_refused(as_owner, client, path):
    body = BODY if "jobs" in path else BODY | {"matrix": {"norm": ["none", "sync"]}}
    capped = await as_owner("capped")
    refused = await capped.post(path, json=body | {"priority": 11})
    assert (refused.status_code, refused.json()["errors"]) == (
        422,
        [{"field": "priority", "value": 11, "message": "must be at most 10 for the owner capped"}],
    )
    assert (await client.get("/v1/jobs")).json()["jobs"] == []
    for sender, priority in ((capped, 10), (client, 100)):
        assert (await sender.post(path, json=body | {"priority": priority})).status_code in {200, 202}


async def test_a_clone_has_at_most_the_priority_of_its_owner(as_owner, client):
    old = (await client.post("/v1/jobs", json=BODY | {"priority": 90})).json()
    for owner, priority in (("capped", 10), ("ann", 90)):
        admin = await as_owner(owner, "submit", "admin")
        assert (await admin.post(f"/v1/jobs/{old['id']}:clone", json={})).json()["priority"] == priority
