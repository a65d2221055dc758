"""The commands against a real API: what they print, and how they end."""

import json
import os
import subprocess
import sys
import threading
import time
from uuid import uuid4

import pytest
import yaml

from service.cli.connection import default_config_path
from service.domain.scheduling import Capacity
from tests.service.client.bad_network import DROP, Answer
from tests.service.running_api import SPEC, TOKEN
from trainer.jobspec import JobSpec, worker_log_file


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "my-job.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


@pytest.fixture
def comparison(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"spec": SPEC, "matrix": {"norm": ["none", "sync"]}, "target": 0.5}))
    return path


@pytest.fixture
def later():
    """Do something in a thread, a little later."""
    threads = []

    def start(*steps, pause=0.4):
        def go_on():
            for step in steps:
                time.sleep(pause)
                step()

        threads.append(threading.Thread(target=go_on))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(20)


def read(answer):
    code, printed, told = answer
    assert code == 0, told
    return json.loads(printed)


def test_a_job_is_submitted_on_all_its_terms(syncbn, spec):
    job = read(
        syncbn(
            "submit", spec, "--json", "--set", "optimizer.lr=1e-3", "--set", "norm=batch", "--set", "num_workers=[1,2]",
            "--tag", "a", "--tag", "b", "--priority", 7, "--retries", "hang=0", "--retries", "preempted=3",
            "--queue-seconds", 60, "--run-seconds", 120.5,
        )
    )  # fmt: skip
    assert (job["name"], job["priority"], job["tags"], job["retries"]) == (
        "my-job", 7, ["a", "b"], {"infrastructure": 5, "preempted": 3, "hang": 0, "unknown": 1},
    )  # fmt: skip
    assert (job["queue_seconds"], job["run_seconds"], job["spec"]["norm"]) == (60, 120.5, "batch")
    assert (job["spec"]["optimizer"]["lr"], job["spec"]["num_workers"]) == (0.001, [1, 2])
    code, printed, told = syncbn("submit", spec, "--name", "by hand")
    assert (code, told) == (0, "")
    assert printed.startswith("job-")
    assert printed.endswith(": queued\n")


def test_a_submission_under_a_key_is_done_once(syncbn, spec, comparison):
    for arguments in [("submit", spec), ("compare", comparison, "--no-wait")]:
        key = uuid4().hex
        first, again = (read(syncbn(*arguments, "--idempotency-key", key, "--json")) for _ in range(2))
        assert first == again


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--set", "steps"), "must be NAME=VALUE (got steps)"),
        (("--set", "steps=[1"), "steps takes JSON or YAML (got [1)"),
        (("--set", "steps=2001-99-99"), "steps takes JSON or YAML (got 2001-99-99)"),
        (("--set", "steps=!!int x"), "steps takes JSON or YAML (got !!int x)"),
        (("--set", "steps=" + "9" * 5_000), "steps takes JSON or YAML (got 9999"),
        (("--set", "steps=" + "[" * 3_000), "steps takes JSON or YAML (got [[["),
        (("--set", "steps=NaN"), "steps: must be a JSON value"),
        (("--set", "steps.x=1"), "steps.x: steps is 10, and has no fields"),
        (("--set", "a=1", "--set", "a=2"), "must name each name once (got a twice)"),
        (("--retries", "hang=often"), "hang must be a whole number (got often)"),
        (("--retries", "user=1"), "retries.user: Extra inputs"),
        (("--priority", "1000"), "priority: Input should be less than or equal to 100"),
        (("--tag", "a", "--tag", "a"), "must have each tag once"),
        (("--secret", "PATH=x"), "must not be PATH"),
        (("--queue-seconds", "0"), "queue_seconds: Input should be greater than 0"),
        (("--secret", "A=hf_ABC DEF"), "secrets.A: String should match pattern"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_sent(syncbn, api, spec, options, told):
    with api.client() as client:
        before = sum(client.cluster().jobs.values())
        code, printed, error = syncbn("submit", spec, *options)
        assert (code, printed) == (2, "")
        assert told in " ".join(error.replace("│", " ").split())
        assert "hf_ABC" not in error
        assert sum(client.cluster().jobs.values()) == before


def test_wrong_files_are_named(syncbn, tmp_path):
    for text, told in [
        ("- 1", "holds no mapping"),
        ("{", "holds no YAML"),
        ("\x00", "holds no YAML"),
        ("steps: 2020-01-01", "must be a JSON value"),
        ("steps: .nan", "must be a JSON value"),
    ]:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        for name in ("submit", "validate", "compare"):
            code, _, error = syncbn(name, path)
            assert code == 2
            assert told in " ".join(error.replace("│", " ").split())
    path.write_text("presets: {}")
    assert syncbn("compare", path)[0] == 2
    assert syncbn("submit", "nothing.yaml")[0] == syncbn("compare", "nothing")[0] == syncbn("nonsense")[0] == 2
    assert syncbn("compare", "lr-sweep", "--preset", "huge")[0] == 2


def test_what_the_service_refuses_ends_with_1(syncbn, spec):
    code, printed, error = syncbn("submit", spec, "--set", "optimizer.lr=-1")
    assert (code, printed) == (1, "")
    assert "spec.optimizer.lr: Input should be greater than 0" in error
    for name in ("show", "cancel", "resume", "clone", "logs"):
        code, _, error = syncbn(name, "job-0")
        assert (code, error) == (1, "error: there is no job 'job-0'\n")
    assert syncbn("report", "comparison-0")[0] == 1


def test_no_answer_ends_with_4_after_telling_of_its_tries(syncbn, network, monkeypatch):
    monkeypatch.setenv("SYNCBN_URL", network.url)
    monkeypatch.setattr("service.client.retry.PATIENT.__class__.tries", 3)
    network.faults.extend([Answer(503, {"Retry-After": "3600"})])
    code, printed, error = syncbn("jobs")
    assert (code, printed) == (4, "")
    assert "answered 503" in error
    network.faults.extend([DROP])
    code, _, error = syncbn("jobs")
    assert code == 0
    assert "does not answer" in error
    assert "trying again in" in error


def test_a_service_without_a_token_and_a_faulty_config_file_are_wrong_use(syncbn, monkeypatch, api):
    monkeypatch.delenv("SYNCBN_TOKEN")
    code, _, error = syncbn("jobs")
    assert code == 2
    assert "needs a token" in error
    code, _, error = syncbn("jobs", "--url", "nonsense", "--token", "x")
    assert code == 2
    assert "must be an address" in error
    monkeypatch.delenv("SYNCBN_URL")
    path = default_config_path()
    path.parent.mkdir()
    path.write_text(f'url = "{api.url}"\ntoken = "{TOKEN}"\n')
    path.chmod(0o644)
    code, _, error = syncbn("jobs")
    assert code == 2
    assert "chmod 600" in error
    assert TOKEN not in error
    path.chmod(0o600)
    assert syncbn("jobs")[0] == 0


def test_waiting_shows_a_bar_and_ends_with_the_job(syncbn, api, spec, later):
    tag = uuid4().hex

    def find():
        with api.client() as client:
            return next(client.jobs(tag=tag)).id

    later(
        lambda: api.move(find(), "submitted", "running"),
        lambda: api.progress(find(), 6),
        lambda: api.move(find(), "succeeded", reason="finished 10 steps"),
    )
    code, printed, told = syncbn("submit", spec, "--wait", "--tag", tag)
    assert code == 0, told
    assert printed.splitlines()[-1] == f"{find()}: succeeded, finished 10 steps"
    assert "6/10 steps" in told
    assert "succeeded" in told


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_job_that_was_waited_for_and_ended_badly_gives_3(syncbn, api, spec, later, state):
    tag = uuid4().hex

    def end():
        with api.client() as client:
            api.move(next(client.jobs(tag=tag)).id, "submitted", state, reason="[bold] trouble")

    later(end)
    code, printed, _ = syncbn("submit", spec, "--wait", "--json", "--tag", tag)
    assert (code, json.loads(printed)["state"]) == (3, state)


def test_a_submission_is_checked_without_being_stored(syncbn, api, spec, comparison):
    api.ray.is_down = False
    api.ray.total = Capacity(cpus=0)  # nothing is dispatched
    try:
        before = read(syncbn("cluster", "--json"))["jobs"]
        found = read(syncbn("validate", spec, "--set", "num_workers=3", "--json"))
        assert (found["jobs"], found["least"], found["fits"]) == (1, {"cpus": 3, "gpus": 0}, False)
        assert "no; it would wait in the queue" in syncbn("validate", spec)[1]
        assert read(syncbn("validate", comparison, "--set", "steps=3", "--json"))["spec"]["steps"] == 3
        assert "2 jobs" in syncbn("validate", comparison)[1]
        assert read(syncbn("validate", "lr-sweep", "--json"))["jobs"] > 1
        assert syncbn("validate", spec, "--set", "steps=-1")[0] == 1
        assert read(syncbn("cluster", "--json"))["jobs"] == before
    finally:
        api.ray.is_down = True


def test_jobs_are_listed_by_what_they_are(syncbn, api, spec):
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
    assert listed("--limit", "1000") == ids[::-1]  # more than a page may have
    _, printed, told = syncbn("jobs", "--tag", tag, "--limit", 2)
    assert all(each in printed for each in ids[1:])
    assert told == "There are more than these 2; --limit shows them.\n"
    assert syncbn("jobs", "--state", "asleep")[0] == 2


def test_a_job_is_shown_with_its_timeline(syncbn, api):
    job_id = api.submit()
    api.move(job_id, "submitted", "running")
    api.progress(job_id, 3)
    api.move(job_id, "failed", reason="worker 0: [bold] KeyError: 'x'")
    code, printed, _ = syncbn("show", job_id)
    assert code == 0
    for part in ("failed: worker 0: [bold] KeyError: 'x'", "3/10", "submitted by the user", "hidden: [8]"):
        assert part in printed
    shown = read(syncbn("show", job_id, "--json"))
    assert JobSpec.model_validate_json(json.dumps(shown["spec"])).steps == 10
    assert [event["state"] for event in shown["events"]] == ["queued", "submitted", "running", "failed"]


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
    code, printed, told = syncbn("clone", ids[0], "--set", "optimizer.rl=1")
    assert (code, printed) == (1, "")
    assert "must be a path into the spec" in told
    made = read(syncbn("compare", comparison, "--no-wait", "--json"))["comparison"]
    code, printed, _ = syncbn("cancel", made["id"])
    assert code == 0
    assert [line.partition(":")[0] for line in printed.splitlines()] == [job["id"] for job in made["jobs"]]


def test_control_characters_are_escaped_but_in_raw_logs(syncbn, api):
    """What a job prints, and the reason of its end, must not steer a terminal."""
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "a\tb\x1b[31mred\x07\u202e\x9b1m é\n")
    api.move(job_id, "failed", reason="worker 0: SystemExit: weird\x1b[31m\x9b")
    escaped = "a\tb\\x1b[31mred\\x07\\u202e\\x9b1m é\n"
    assert syncbn("logs", job_id)[1] == syncbn("logs", "-f", job_id)[1] == escaped
    raw = "a\tb\x1b[31mred\x07\u202e\x9b1m é\n"
    assert syncbn("logs", job_id, "--raw")[1] == syncbn("logs", "-f", job_id, "--raw")[1] == raw
    for command in (("show", job_id), ("jobs",), ("show", job_id, "--json"), ("logs", "-f", job_id, "--json")):
        code, printed, told = syncbn(*command)
        assert code == 0
        assert not {"\x1b", "\x9b", "\x07"} & set(printed + told)
    assert "weird\\x1b[31m\\x9b" in syncbn("show", job_id)[1]


def test_logs_are_printed_and_followed(syncbn, api, later):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "worker 1 of 2 on a, process 7\nERROR: no\n", worker_log_file(1))
    api.write(job_id, "driver [bold]\n")
    assert syncbn("logs", job_id)[1] == "[1] worker 1 of 2 on a, process 7\n[1] ERROR: no\ndriver [bold]\n"
    assert syncbn("logs", job_id, "--rank", 1, "--level", "warning")[1] == "[1] ERROR: no\n"
    assert read(syncbn("logs", job_id, "--level", "error", "--json")) == {"lines": ["[1] ERROR: no"]}
    later(lambda: api.write(job_id, "more\n"), lambda: api.move(job_id, "failed"))
    code, printed, told = syncbn("logs", "-f", job_id)
    assert (code, told) == (0, f"{job_id}: failed\n")
    assert printed == "[1] worker 1 of 2 on a, process 7\n[1] ERROR: no\ndriver [bold]\nmore\n"
    code, printed, _ = syncbn("logs", "-f", job_id, "--rank", 1, "--level", "error", "--attempt", 1, "--json")
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"rank": 1, "level": "error", "text": "ERROR: no"},
        {"state": "failed"},
    ]
    assert syncbn("logs", job_id, "--attempt", 2)[0] == 1
    assert syncbn("logs", job_id, "--level", "loud")[0] == 2


def test_a_comparison_is_waited_for_and_reported(syncbn, api, comparison, later, tmp_path):
    tag = uuid4().hex

    def end(*states):
        with api.client() as client:
            jobs = list(client.jobs(tag=tag))
        for job, state in zip(jobs, states, strict=True):
            api.mlflow.curves[f"run-of-{job.id}", "accuracy"] = [(0, 0.1), (5, 0.6), (9, 0.7)]
            api.move(job.id, "submitted", state)

    later(lambda: end("succeeded", "succeeded"))
    code, printed, told = syncbn("compare", comparison, "--tag", tag)
    assert code == 0, told
    comparison_id = printed.partition(":")[0]
    assert "steps to 0.5" in printed
    assert "norm=sync" in told
    report = read(syncbn("report", comparison_id, "--json", "--plot", tmp_path / "curves.png"))
    assert (report["finished"], [each["label"] for each in report["variants"]]) == (True, ["norm=none", "norm=sync"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    tag = uuid4().hex
    later(lambda: end("succeeded", "failed"))
    code, printed, _ = syncbn("compare", comparison, "--tag", tag, "--json")
    found = json.loads(printed)
    assert code == 3
    assert {job["state"] for job in found["comparison"]["jobs"]} == {"succeeded", "failed"}
    assert (found["report"]["finished"], found["verdict"]) == (True, None)


def test_a_recipe_is_found_by_its_name(syncbn):
    recipes = read(syncbn("recipes", "--json"))
    assert len(recipes) == 11
    assert "fig1-activations" in syncbn("recipes")[1]
    made = read(syncbn("compare", "fig1-activations", "--no-wait", "--json", "--priority", -5))
    assert made["comparison"]["name"] == "fig1-activations"
    assert {job["priority"] for job in made["comparison"]["jobs"]} == {-5}
    assert syncbn("cancel", made["comparison"]["id"])[0] == 0


def test_the_cluster_is_shown_with_and_without_ray(syncbn, api):
    api.submit()
    code, printed, _ = syncbn("cluster")
    assert code == 0
    assert "Ray does not answer" in printed
    assert "queued" in printed
    shown = read(syncbn("cluster", "--json"))
    assert (shown["total"], shown["readiness"]["database"]["ok"], shown["readiness"]["ray"]["ok"]) == (
        None,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("words", "found"), [("syncbn compare lr", ["lr-sweep"]), ("syncbn jobs --state s", ["submitted", "succeeded"])]
)
def test_the_shell_completes_recipes_and_choices(words, found):
    environment = os.environ | {
        "_SYNCBN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    command = [sys.executable, "-c", "from service.cli.app import app; app(prog_name='syncbn')"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.split() == found
