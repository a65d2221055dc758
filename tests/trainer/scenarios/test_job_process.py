"""Processes of a job on a real Ray: environment, output, exit, and processes left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from service.adapters.job_log import AttemptLog, LogOffset
from service.adapters.run_storage import RunFiles
from tests.processes import still_alive, wait_for_file, working_in
from trainer.jobspec import (
    JOB_VARIABLE,
    LOG_FILE,
    OUTCOME_FILE,
    Allowlist,
    AttemptContext,
    AttemptTask,
    JobSpec,
    Outcome,
    attempt_folder,
)
from trainer.worker_settings import CPU_VARIABLES

pytestmark = pytest.mark.ray

MODELS = """
import json, os, subprocess, sys, time
import torch
import torch.distributed as dist

LINES = 50_000
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); open('deaf', 'a'); time.sleep(300)"

def make(classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))

def busy(classes):
    rank = dist.get_rank()
    json.dump(dict(os.environ), open(f"environment-{rank}", "w"))
    for number in range(LINES):
        print(f"line {number} with a good many bytes in it, so that all of them are many megabytes")
    os.system("echo printed by a child")
    print("\\r".join(f"{percent} %" for percent in range(101)))
    subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
    while not os.path.exists("deaf"):
        time.sleep(0.01)
    return make(classes)

def leaving(classes):
    if dist.get_rank() == 1:
        os._exit(7)
    return make(classes)

def waiting(classes):
    open(f"waiting-{dist.get_rank()}", "w")
    time.sleep(300)
"""
UNUSED_ACTORS = ("DatasetManager", "PlacementGroupCleaner")
"""Actors of Ray Train that a job has no use for; each takes seconds to start."""
VALUE = "a-secret-value"
SPEC = {"data": {"name": "digits"}, "num_workers": 2, "steps": 4, "eval_every": 2, "log_model": False}


def start(folder, model, **context):
    """Start a driver with a private Ray in `folder`, as Ray's job server does on a cluster."""
    (folder / "models.py").write_text(MODELS)
    spec = SPEC | {"model": {"name": f"import:models:{model}", "arguments": {"classes": 10}}}
    task = AttemptTask(
        spec=JobSpec.model_validate(spec),
        context=AttemptContext(
            job_id="job-1",
            attempt=1,
            name="test",
            folder=str(folder / "job-1"),
            permissions=Allowlist(everything=True),
            **context,
        ),
    )
    node = {name: value for name, value in os.environ.items() if name not in CPU_VARIABLES}
    environment = node | {
        JOB_VARIABLE: str(RunFiles(folder).write_task(task)),
        "SYNCBN_TOKEN": "the-token-of-the-service",
        "RAY_ADDRESS": "local",  # and not that of another test
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "ab" * 32,
    }
    with (folder / "output").open("w") as output:
        command = [sys.executable, "-m", "trainer"]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def outcome_in(folder):
    return Outcome.model_validate_json((attempt_folder(folder / "job-1", 1) / OUTCOME_FILE).read_text())


def lines_in(folder):
    return list(AttemptLog(attempt_folder(folder / "job-1", 1), LogOffset()).read(is_over=True))


def text_in(folder):
    return (folder / "output").read_text() + "\n".join(line.text for line in lines_in(folder))[-5_000:]


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """Succeeded job of two workers that print concurrently and each leave a child that ignores SIGTERM."""
    folder = tmp_path_factory.mktemp("busy")
    secret = folder / "ann" / "secret"
    secret.parent.mkdir()
    secret.write_text(VALUE + "\n")
    secret.chmod(0o600)
    process = start(folder, "busy", secrets={"A_SECRET": str(secret)})
    process.wait(150)
    ended_at = time.monotonic()
    outcome = outcome_in(folder)
    assert outcome.state == "succeeded", f"{outcome}\n{text_in(folder)}"
    return SimpleNamespace(folder=folder, ended_at=ended_at, lines=lines_in(folder))


def test_no_process_outlives_its_job_by_15_seconds(busy):
    left = [process for process in working_in(busy.folder) if "deaf" in " ".join(process.cmdline())]
    assert still_alive(left, 15 - (time.monotonic() - busy.ended_at)) == []
    assert (busy.folder / "deaf").exists()


def test_each_line_of_each_worker_is_in_the_log_once(busy):
    for rank in (0, 1):
        texts = [line.text for line in busy.lines if line.rank == rank]
        numbered = [int(text.split()[1]) for text in texts if text.startswith("line ")]
        assert numbered == list(range(50_000))
        assert texts.count("printed by a child") == 1
        assert texts.count("100 %") == 1
    assert sum("step 4/4" in line.text for line in busy.lines) == 1


def test_the_log_has_no_messages_of_ray(busy):
    text = "\n".join(line.text for line in busy.lines)
    for noise in ("PreemptionWatcher", "TrainController", "(raylet)", "RayTrainWorker", "INFO", "\x1b"):
        assert noise not in text
    assert [line.text for line in busy.lines if line.level in ("warning", "error")] == []


def test_each_worker_sees_the_jobs_secret_its_settings_and_no_credential_of_the_service(busy):
    for rank in (0, 1):
        environment = json.loads((busy.folder / f"environment-{rank}").read_text())
        assert environment["A_SECRET"] == VALUE
        assert environment.items() >= CPU_VARIABLES.items()
        assert not {"SYNCBN_TOKEN", "SYNCBN_JOB", "RAY_AUTH_TOKEN"} & environment.keys()
    written = [path for path in (busy.folder / "job-1").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not any(VALUE.encode() in path.read_bytes() for path in written)
    assert VALUE not in (busy.folder / "output").read_text()


def test_an_exit_in_user_code_is_a_user_code_failure(tmp_path):
    start(tmp_path, "leaving").wait(150)
    outcome = outcome_in(tmp_path)
    assert (outcome.state, outcome.cause, outcome.rank) == ("failed", "user_code", 1), text_in(tmp_path)
    assert outcome.reason == "worker 1: its process ended with status 7"
    history = json.loads((tmp_path / "job-1/checkpoints/run.json").read_text())
    assert len(history["worker_group_runs"]) == 1


def test_a_killed_driver_leaves_an_outcome_and_no_process(tmp_path):
    process = start(tmp_path, "waiting")
    wait_for_file(tmp_path / "waiting-1", 120)
    everything = working_in(tmp_path)
    titles = " ".join(process.cmdline()[0] for process in everything)
    assert "ray::TrainController" in titles
    assert not any(name in titles for name in UNUSED_ACTORS)
    (driver,) = [
        child for child in psutil.Process(process.pid).children() if child.cmdline()[1:3] == ["-m", "trainer"]
    ]
    driver.kill()
    process.wait(20)
    outcome = outcome_in(tmp_path)
    assert (outcome.state, outcome.cause) == ("failed", "worker_lost")
    assert outcome.reason.startswith("the driver was killed by signal 9 (Killed) at ")
    assert outcome.reason in (attempt_folder(tmp_path / "job-1", 1) / LOG_FILE).read_text()
    assert still_alive(everything, 15) == []
    assert process.returncode == 128 + signal.SIGKILL
