"""Faults injected into the containers while a job trains, and how each job ends.

Every row of the table in docs/reliability.md is a test here; the table with the measured figures is printed
at the end.
"""

import random
import re
import time
from dataclasses import dataclass, field
from typing import get_args

import pytest

from service.client import ApiError
from trainer.jobspec import FailureKind

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = 1_200
SPEC = {
    "model": {"name": "import:faulty_models:faulty"},
    "data": {"name": "digits"},
    "num_workers": 2,
    "placement": "spread",
    "global_batch_size": 50,
    "steps": STEPS,
    "eval_every": 100,
    "optimizer": {"lr": 0.1, "momentum": 0.9},
    "checkpoint": {"every": 50},
    "collective_timeout_seconds": 200,
    "log_model": False,
}
END_SECONDS = 600
HASH = """
import hashlib, sys, torch
state = torch.load(sys.argv[1], weights_only=True)
content = b"".join(state[name].numpy().tobytes() for name in sorted(state))
print(hashlib.sha256(content).hexdigest())
"""
RESTART = rf"\b({'|'.join(get_args(FailureKind))}): [^\n]*; restarting from the last checkpoint"


@dataclass
class Row:
    """Row of the table: a fault, its end, and what was measured."""

    fault: str
    seed: int
    end: str
    attempts: int
    kinds: list[str]
    seconds: float | None
    exact: bool | None

    def __str__(self):
        shown = ["–" if value is None else str(value) for value in (self.seconds, self.exact)]
        cells = [self.fault, self.seed, self.end, self.attempts, ", ".join(self.kinds) or "–", *shown]
        return "| " + " | ".join(map(str, cells)) + " |"


@dataclass
class Table:
    """Measured rows, and the kinds that were expected and found."""

    rows: list[Row] = field(default_factory=list)
    classified: dict[str, tuple[str, str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def table(request):
    """Collect the rows; print them after the last test."""
    found = Table()
    yield found
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line(
            "\n| fault | seed | end | attempts | kinds | seconds until it trains on | same bits |"
        )
        reporter.write_line("|---|---|---|---|---|---|---|")
        for row in found.rows:
            reporter.write_line(str(row))
        right = sum(expected == kind for expected, kind in found.classified.values())
        reporter.write_line(f"classified: {right} of {len(found.classified)}")


class FaultyJob:
    """Job that trains while a fault is injected."""

    def __init__(self, compose, client, name, spec=SPEC):
        self.compose, self.client = compose, client
        self.id = client.submit_job(name, spec).id
        self.seen = {}
        """Failure kinds of attempts, by the attempt that followed."""

    def step(self):
        """Return the step of the newest attempt, or None."""
        try:
            job = self.client.job(self.id)
        except ApiError:
            return None  # the API is the part that is faulty
        if job.failure_kind is not None:
            self.seen[job.attempt] = job.failure_kind
        return (job.attempt, job.progress.step) if job.progress else None

    def until(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition(self.step()):
            assert time.monotonic() < deadline, f"{self.client.job(self.id)}\n{self.client.logs(self.id)}"
            time.sleep(0.2)

    def until_step(self, step):
        self.until(lambda found: found is not None and found[1] >= step)

    def until_it_trains_on(self, began):
        """Return the seconds from `began` until the job is 100 steps further than now."""
        self.until(lambda found: found is not None)
        _, reached = self.step() or (0, 0)
        self.until(lambda found: found is not None and found[1] >= reached + 100, 400)
        return round(time.monotonic() - began, 1)

    def ended(self):
        """Wait for the end and return the job."""
        deadline = time.monotonic() + END_SECONDS
        while not (job := self.client.job(self.id)).state.is_terminal:
            assert time.monotonic() < deadline, f"{job}\n{self.client.logs(self.id)}"
            self.step()
            time.sleep(0.3)
        return job

    def kinds(self):
        """Return the failure kinds of restarts inside attempts, and of attempts."""
        return [*re.findall(RESTART, self.client.logs(self.id)), *self.seen.values()]

    def weights(self, job):
        """Return a hash of the trained weights."""
        path = f"/storage/{self.id}/attempt-{job.attempt}/model.pt"
        return self.compose.python(self.compose.container("ray-head"), HASH, path)

    def worker(self, rank):
        """Return container and process id, on this machine, of a worker of the newest group."""
        lines = re.findall(rf"worker {rank} of 2 on (\S+), process (\d+)", self.client.logs(self.id))
        host, pid = lines[-1]
        name = next(
            name
            for name in self.compose.containers("ray-worker")
            if self.compose.inspect(name, "{{.Config.Hostname}}") == host
        )
        return name, int(pid)


@pytest.fixture
def client(compose):
    compose.until_ready()
    with compose.client() as client:
        yield client


@pytest.fixture(scope="module")
def reference(compose):
    """Hash of the weights without a fault."""
    with compose.client() as client:
        job = FaultyJob(compose, client, "undisturbed")
        ended = job.ended()
        assert ended.state == "succeeded", client.logs(job.id)
        return job.weights(ended)


def kill_worker(job, chance):
    name, pid = job.worker(chance.randrange(2))
    job.compose.python(name, "import os, sys; os.kill(int(sys.argv[1]), 9)", str(pid))


def kill_raylet(job, chance):
    job.compose.python(job.worker(chance.randrange(2))[0], KILL_RAYLET)


KILL_RAYLET = """
import psutil
[process.kill() for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"]
"""
COUNT_RAYLETS = """
import psutil
print(sum(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])))
"""
COUNT_DRIVERS = """
import psutil
lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
print(sum(line[1:3] == ["-m", "trainer"] for line in lines))
"""
KILL_DRIVER = """
import psutil
for process in psutil.process_iter(["cmdline"]):
    if (process.info["cmdline"] or [])[1:3] == ["-m", "trainer"]:
        process.kill()
"""


def kill_driver(job, chance):
    job.compose.python(job.compose.container("ray-head"), KILL_DRIVER)


def restart_after(job, name, seconds):
    job.compose.kill(name)
    time.sleep(seconds)
    job.compose.start(name)


def kill_node(job, chance):
    restart_after(job, job.worker(chance.randrange(2))[0], 10)


def kill_head(job, chance):
    restart_after(job, job.compose.container("ray-head"), 5)


def kill_api(job, chance):
    restart_after(job, job.compose.container("api"), 5)


def kill_mlflow(job, chance):
    restart_after(job, job.compose.container("mlflow"), 10)


def kill_postgres(job, chance):
    restart_after(job, job.compose.container("postgres"), 5)


def cut_off(seconds):
    def inject(job, chance):
        with job.compose.cut_off(job.worker(chance.randrange(2))[0]):
            time.sleep(seconds)

    return inject


def slow_down(job, chance):
    with job.compose.slowed_down(job.worker(chance.randrange(2))[0], 0.2):
        time.sleep(30)


def drain(job, chance):
    name, _ = job.worker(chance.randrange(2))
    address = job.compose.python(name, "import ray.util; print(ray.util.get_node_ip_address())")
    job.compose.python(job.compose.container("ray-head"), DRAIN, address)
    return name


def replace_drained(job, name):
    """Start the container of a drained node as a new one, after Ray's part of it has ended."""
    deadline = time.monotonic() + 120
    while job.compose.python(name, COUNT_RAYLETS) != "0":
        assert time.monotonic() < deadline, f"the drained raylet of {name} has not ended"
        time.sleep(1)
    restart_after(job, name, 0)


DRAIN = """
import json, subprocess, sys
from ray.util.state import list_nodes
[node] = [n for n in list_nodes() if n.node_ip == sys.argv[1] and n.state == "ALIVE"]
subprocess.run(
    ["ray", "drain-node", "--address", "ray-head:6379", "--node-id", node.node_id, "--reason",
     "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "30"],
    check=True, timeout=60,
)
"""


def fill_disk(job, chance):
    """Fill the storage, submit into it, and free it."""
    head = job.compose.container("ray-head")
    job.compose.call("exec", head, "dd", "if=/dev/zero", "of=/storage/filler", "bs=1M", check=False)
    try:
        deadline = time.monotonic() + 60
        while job.client.ready().ready:
            assert time.monotonic() < deadline
            time.sleep(1)
        with pytest.raises(ApiError) as refused:
            job.client.submit_job("no room", SPEC)
        assert refused.value.problem.status == 507
        time.sleep(10)
    finally:
        job.compose.call("exec", head, "rm", "/storage/filler")


@dataclass(frozen=True)
class Case:
    """Fault, and how a job must end."""

    name: str
    seed: int
    inject: object
    attempts: int = 1
    kind: str | None = None
    """Failure kind that must be found; None if nothing may fail."""
    repair: object = None
    """What to do after the job has ended, with the result of `inject`."""


CASES = [
    Case("worker killed", 1, kill_worker, kind="worker_lost"),
    Case("raylet killed", 2, kill_raylet, kind="worker_lost"),
    Case("node killed, back after 10 s", 3, kill_node, kind="worker_lost"),
    Case("driver killed", 4, kill_driver, attempts=2, kind="worker_lost"),
    Case("head killed, back after 5 s", 5, kill_head, attempts=2, kind="worker_lost"),
    Case("API killed, back after 5 s", 6, kill_api),
    Case("MLflow killed, back after 10 s", 7, kill_mlflow),
    Case("PostgreSQL killed, back after 5 s", 8, kill_postgres),
    Case("disk full for 10 s", 9, fill_disk, attempts=2, kind="worker_lost"),
    Case("node cut off for 5 s", 10, cut_off(5)),
    Case("node cut off for 30 s", 11, cut_off(30)),
    Case("node cut off for 120 s", 12, cut_off(120), kind="worker_lost"),
    Case("node at a fifth of a core for 30 s", 13, slow_down),
    Case("node drained", 14, drain, kind="preempted", repair=replace_drained),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_job_ends_as_without_the_fault(compose, client, reference, table, case):
    chance = random.Random(case.seed)
    job = FaultyJob(compose, client, case.name)
    job.until_step(chance.randint(150, 400))
    began = time.monotonic()
    injected = case.inject(job, chance)
    seconds = job.until_it_trains_on(began)
    ended = job.ended()
    if case.repair is not None:
        case.repair(job, injected)
    kinds = job.kinds()
    exact = job.weights(ended) == reference
    table.rows.append(Row(case.name, case.seed, ended.state, ended.attempt, kinds, seconds, exact))
    if case.kind is not None:
        table.classified[case.name] = (case.kind, kinds[0] if kinds else "none")
    assert (ended.state, ended.reason) == ("succeeded", f"finished {STEPS} steps"), client.logs(job.id)
    assert ended.attempt == case.attempts, client.logs(job.id)
    assert set(kinds) == ({case.kind} if case.kind else set()), f"{kinds}\n{client.logs(job.id)}"
    assert exact
    assert no_driver_is_left(compose)


def no_driver_is_left(compose):
    return compose.python(compose.container("ray-head"), COUNT_DRIVERS) == "0"


USER_FAULTS = [
    ("raise_error", 20, "user_code"),
    ("raise_error", 21, "user_code"),
    ("exit_process", 22, "user_code"),
    ("crash", 23, "user_code"),
    ("exhaust_memory", 24, "out_of_memory"),
    ("exhaust_memory", 25, "out_of_memory"),
    ("hang", 26, "hang"),
    ("corrupt_image", 27, "data"),
    ("diverge", 28, "diverged"),
    ("missing_data", 29, "data"),
    ("raise_error", 30, "user_code"),
    ("hang", 31, "hang"),
]


FOLDERS = {"corrupt_image": "/storage/images", "missing_data": "/storage/nothing"}
MAKE_IMAGES = f"""
from pathlib import Path
from PIL import Image
root = Path("{FOLDERS["corrupt_image"]}")
for folder in (root / "train/a", root / "train/b", root / "val/a", root / "val/b"):
    folder.mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (8, 8), (6 * number, 0, 0)).save(folder / f"{{number}}.png")
(root / "train/a/7.png").write_bytes(b"not an image")
"""


def spec_of(fault, seed):
    chance = random.Random(seed)
    arguments = {"fault": fault, "rank": chance.randrange(2), "at": chance.randint(5, 60)}
    changes = {"model": SPEC["model"] | {"arguments": arguments}}
    if fault in FOLDERS:
        changes = {"data": {"name": "imagefolder", "root": FOLDERS[fault]}, "model": {"name": "cnn"}}
    return SPEC | {"steps": 200, "collective_timeout_seconds": 10} | changes


@pytest.mark.parametrize(("fault", "seed", "kind"), USER_FAULTS)
def test_a_fault_of_the_user_is_classified(compose, client, table, fault, seed, kind):
    if fault == "corrupt_image":
        compose.python(compose.container("ray-head"), MAKE_IMAGES)
    job = FaultyJob(compose, client, f"{fault} {seed}", spec_of(fault, seed))
    ended = job.ended()
    table.rows.append(Row(fault, seed, ended.state, ended.attempt, [ended.failure_kind], None, None))
    table.classified[f"{fault} {seed}"] = (kind, ended.failure_kind)
    assert ended.state == ("succeeded" if kind == "diverged" else "failed"), client.logs(job.id)


def test_at_least_19_of_20_faults_are_classified(table):
    wrong = {name: kinds for name, kinds in table.classified.items() if kinds[0] != kinds[1]}
    assert len(table.classified) == 20
    assert len(wrong) <= 1, wrong
