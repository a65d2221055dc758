"""Commands with a real API: their output and exit status."""

import json
import time
from uuid import uuid4

import pytest

from service.domain.resources import Resources
from tests.service.cli.commands import read
from trainer.jobspec import JobSpec


def test_a_job_is_submitted_with_all_options(syncbn, spec):
    job = read(
        syncbn(
            "submit", spec, "--json", "--set", "optimizer.lr=1e-3", "--set", "norm=batch", "--set",
            "num_workers=[1,2]", "--tag", "a", "--tag", "b", "--priority", 7, "--retries", "hang=0",
            "--retries", "preempted=3", "--queue-timeout-seconds", 60, "--max-run-seconds", 120.5,
        )
    )  # fmt: skip
    assert (job["name"], job["priority"], job["tags"], job["retries"]) == (
        "my-job", 7, ["a", "b"], {"infrastructure": 5, "preempted": 3, "hang": 0, "unknown": 1},
    )  # fmt: skip
    assert (job["queue_timeout_seconds"], job["max_run_seconds"], job["spec"]["norm"]) == (60, 120.5, "batch")
    assert (job["spec"]["optimizer"]["lr"], job["spec"]["num_workers"]) == (0.001, [1, 2])
    code, stdout, stderr = syncbn("submit", spec, "--name", "by hand")
    assert (code, stderr) == (0, "")
    assert stdout.startswith("job-")
    assert stdout.endswith(": queued\n")


def test_a_submission_with_a_key_is_stored_once(syncbn, spec, comparison):
    for arguments in [("submit", spec), ("compare", comparison, "--no-wait")]:
        key = uuid4().hex
        first, again = (read(syncbn(*arguments, "--idempotency-key", key, "--json")) for _ in range(2))
        assert first == again


def test_waiting_shows_a_bar_and_ends_with_the_job(syncbn, api, spec, later):
    tag = uuid4().hex

    def find():
        return api.wait_for_jobs(tag)[0].id

    later(
        lambda: api.move(find(), "submitted", "running"),
        lambda: api.progress(find(), 6),
        lambda: api.move(find(), "succeeded", reason="finished 10 steps"),
    )
    code, stdout, stderr = syncbn("submit", spec, "--wait", "--tag", tag)
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == f"{find()}: succeeded, finished 10 steps"
    assert "6/10 steps" in stderr
    assert "succeeded" in stderr


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_waiting_for_a_failed_job_exits_with_3(syncbn, api, spec, later, state):
    tag = uuid4().hex

    later(lambda: api.move(api.wait_for_jobs(tag)[0].id, "submitted", state, reason="[bold] error"))
    code, stdout, _ = syncbn("submit", spec, "--wait", "--json", "--tag", tag)
    assert (code, json.loads(stdout)["state"]) == (3, state)


def test_a_submission_is_checked_without_being_stored(syncbn, api, spec, comparison):
    api.ray.is_down = False
    api.ray.total = Resources(cpus=0)  # nothing is dispatched
    try:
        before = read(syncbn("cluster", "--json"))["jobs"]
        found = read(syncbn("validate", spec, "--set", "num_workers=3", "--json"))
        assert (found["jobs"], found["min_resources"], found["fits"]) == (1, {"cpus": 3, "gpus": 0}, False)
        assert "no; it would wait in the queue" in syncbn("validate", spec)[1]
        assert read(syncbn("validate", comparison, "--set", "steps=3", "--json"))["spec"]["steps"] == 3
        assert "2 jobs" in syncbn("validate", comparison)[1]
        assert read(syncbn("validate", "lr-sweep", "--json"))["jobs"] > 1
        assert syncbn("validate", spec, "--set", "steps=-1")[0] == 1
        assert read(syncbn("cluster", "--json"))["jobs"] == before
    finally:
        api.ray.is_down = True


def test_jobs_are_listed_by_filter(syncbn, api, spec):
    tag = uuid4().hex
    ids = [
        read(syncbn("submit", spec, "--json", "--tag", tag, "--set", f"norm={norm}"))["id"]
        for norm in ("none", "sync", "sync")
    ]
    api.move(ids[1], "submitted", "failed")

    def listed(*options):
        return [job["id"] for job in read(syncbn("jobs", "--tag", tag, "--json", *options))]

    assert listed() == ids[::-1]
    assert listed("--norm", "sync", "--state", "failed") == [ids[1]]
    assert listed("--owner", "admin") == ids[::-1]
    assert listed("--owner", "ann") == listed("--comparison", "comparison-0") == []
    assert listed("--limit", "2") == ids[:0:-1]
    assert listed("--limit", "1000") == ids[::-1]  # more than the maximum page size
    _, stdout, stderr = syncbn("jobs", "--tag", tag, "--limit", 2)
    assert all(each in stdout for each in ids[1:])
    assert stderr == "There are more than these 2; --limit shows them.\n"
    assert syncbn("jobs", "--state", "asleep")[0] == 2


def test_a_job_is_shown_with_its_timeline(syncbn, api):
    job_id = api.submit()
    api.move(job_id, "submitted", "running")
    api.progress(job_id, 3)
    api.move(job_id, "failed", reason="worker 0: [bold] KeyError: 'x'")
    code, stdout, _ = syncbn("show", job_id)
    assert code == 0
    for part in ("failed: worker 0: [bold] KeyError: 'x'", "3/10", "submitted by the user", "hidden: [8]"):
        assert part in stdout
    shown = read(syncbn("show", job_id, "--json"))
    assert JobSpec.model_validate_json(json.dumps(shown["spec"])).steps == 10
    assert [event["state"] for event in shown["events"]] == ["queued", "submitted", "running", "failed"]


def test_a_job_is_paused_and_resumed(syncbn, api):
    job_id = api.submit()
    assert syncbn("pause", job_id)[:2] == (0, f"{job_id}: paused\n")
    assert "paused by admin" in syncbn("show", job_id)[1]
    resumed = read(syncbn("resume", job_id, "--json"))
    assert (resumed["id"], resumed["pause_requested"]) == (job_id, False)
    read(syncbn("cancel", job_id, "--json"))
    code, _, stderr = syncbn("pause", job_id)
    assert code == 1
    assert "can no longer be paused" in stderr


def test_jobs_are_cancelled_resumed_and_cloned(syncbn, api, spec, comparison):
    ids = [api.submit(), api.submit()]
    asked = read(syncbn("cancel", *ids, "--json"))
    assert [job["id"] for job in asked] == ids
    for job_id in ids:
        while read(syncbn("show", job_id, "--json"))["state"] != "cancelled":
            time.sleep(0.05)
    resumed = read(syncbn("resume", ids[0], "--set", "eval_every=5", "--name", "again", "--json"))
    assert (resumed["resumed_from"], resumed["spec"]["eval_every"], resumed["name"]) == (ids[0], 5, "again")
    cloned = read(syncbn("clone", ids[0], "--set", "optimizer.lr=0.25", "--json"))
    assert (cloned["cloned_from"], cloned["spec"]["optimizer"]["lr"]) == (ids[0], 0.25)
    code, stdout, stderr = syncbn("clone", ids[0], "--set", "optimizer.rl=1")
    assert (code, stdout) == (1, "")
    assert "must be a path into the spec" in stderr
    made = read(syncbn("compare", comparison, "--no-wait", "--json"))["comparison"]
    code, stdout, _ = syncbn("cancel", made["id"])
    assert code == 0
    assert [line.partition(":")[0] for line in stdout.splitlines()] == [job["id"] for job in made["jobs"]]
