import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import yaml

from service.adapters.run_storage import RunFiles
from tests.processes import wait_for_file
from trainer.jobspec import (
    JOB_VARIABLE,
    LOG_FILE,
    OUTCOME_FILE,
    STORAGE_FAILED,
    AttemptContext,
    AttemptTask,
    JobSpec,
    Outcome,
    attempt_folder,
)

SPEC = """
model: {name: mlp, hidden: [16]}
data: {name: digits}
num_workers: 2
steps: 30
eval_every: 10
optimizer: {name: sgd, lr: 0.5}
evaluation: {statistics: precise}
checkpoint: {every: 10, keep_best: test_loss, best_mode: max}
"""


def run(*arguments, cwd, timeout=120):
    command = [sys.executable, "-m", "trainer", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [", "spec.yaml: must be valid YAML"),
        ("steps: 1\noptimizer: {lr: 1e-400}", "greater than 0 (got 0.0)"),
        (b"\xff\xfe\x00", "spec.yaml: must be valid YAML"),
        ("steps: -1", "steps: Input should be greater than or equal to 1 (got -1)"),
        ("step: 1", "step: Extra inputs are not permitted"),
        ("- 1", "valid dictionary"),
        (None, "No such file"),
    ],
)
def test_an_invalid_task_file_is_explained(tmp_path, content, message):
    if content is not None:
        (tmp_path / "spec.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("spec.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


SLEEPING_DRIVER = """
import sys, time
import trainer.__main__ as driver

def sleep(task):
    open("started", "w")
    time.sleep(300)

driver._run_attempt = sleep
sys.exit(driver.main())
"""


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_stopped_driver_writes_no_outcome(tmp_path, is_asked):
    """Ray stops a job by signals to the driver's parent and then the driver; other signals are failures."""
    context = AttemptContext(job_id="job-1", attempt=1, name="test", folder=str(tmp_path / "job-1"))
    task = RunFiles(tmp_path).write_task(
        AttemptTask(spec=JobSpec.model_validate(yaml.safe_load(SPEC)), context=context)
    )
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPING_DRIVER], cwd=tmp_path, env=os.environ | {JOB_VARIABLE: str(task)}
    ) as parent:
        wait_for_file(tmp_path / "started")
        (driver,) = psutil.Process(parent.pid).children()
        if is_asked:
            parent.terminate()
        driver.terminate()
        assert parent.wait(20) == 128 + signal.SIGTERM
    assert (attempt_folder(tmp_path / "job-1", 1) / OUTCOME_FILE).exists() == (not is_asked)


FULL_DISK = """
import errno, os, sys
import trainer.__main__ as driver

def fail(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def run(task):
    fail()

if sys.argv.pop() == "whole run":
    driver.atomic_write = fail
driver._run_attempt = run
sys.exit(driver.main())
"""


@pytest.mark.parametrize("full_for", ["whole run", "a moment"])
def test_a_full_disk_is_a_failure_of_the_storage(tmp_path, full_for):
    context = AttemptContext(job_id="job-1", attempt=1, name="test", folder=str(tmp_path / "job-1"))
    task = RunFiles(tmp_path).write_task(
        AttemptTask(spec=JobSpec.model_validate(yaml.safe_load(SPEC)), context=context)
    )
    command, environment = [sys.executable, "-c", FULL_DISK, full_for], os.environ | {JOB_VARIABLE: str(task)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=60).returncode == STORAGE_FAILED
    # The service has the failure kind from the exit status; to write might hang.
    assert not (attempt_folder(tmp_path / "job-1", 1) / OUTCOME_FILE).exists()


def test_without_a_file_the_usage_is_printed(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 2
    assert "spec: must be a YAML file" in result.stderr


MODELS = """
import os
import torch
from torch import nn

class Fragile(nn.Sequential):
    calls = 0

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled()
        if self.calls > 7 and os.path.exists("fragile") and torch.distributed.get_rank() == 1:
            raise KeyError("weights of my own")
        return super().forward(x)

def fragile():
    return Fragile(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Folder of a run by hand with streamed data, whose model has failed on one worker, and its output."""
    import numpy as np
    import pandas as pd

    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("failed")
    for part, rows in (("train", 512), ("test", 16)):
        (folder / part).mkdir()
        labels = random.integers(0, 3, rows)
        inputs = list((random.normal(size=(rows, 4)) + labels[:, None]).astype(np.float32))
        pd.DataFrame({"image": inputs, "label": labels}).to_parquet(folder / part / "0.parquet")
    spec = {
        "model": {"name": "import:models:fragile"},
        "data": {
            "name": "ray",
            "format": "parquet",
            "train": str(folder / "train"),
            "test": str(folder / "test"),
            "classes": 3,
            "shape": [4],
        },
        "num_workers": 2,
        "global_batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "steps": 20,
        "eval_every": 5,
        "evaluation": {"statistics": "precise"},
        "collective_timeout_seconds": 20,
        # The largest loss is that of the first evaluation after the start.
        "checkpoint": {"every": 5, "keep_best": "test_loss", "best_mode": "max"},
    }
    (folder / "models.py").write_text(MODELS)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    (folder / "fragile").touch()
    return folder, run("spec.yaml", "--output", "out", cwd=folder, timeout=200)


@pytest.mark.ray
def test_a_user_model_that_fails_on_one_worker_with_streamed_data(failed):
    folder, result = failed
    assert result.returncode == 1, result.stdout + result.stderr
    outcome = Outcome.model_validate_json((folder / "out/attempt-1" / OUTCOME_FILE).read_text())
    assert (outcome.state, outcome.cause, outcome.rank, outcome.step) == ("failed", "user_code", 1, 7)
    assert outcome.reason == "worker 1: KeyError: 'weights of my own'"
    assert "models.py" in outcome.traceback
    runs = json.loads((folder / "out/checkpoints/run.json").read_text())["worker_group_runs"]
    assert [(run["attempt"], run["outcome"]["cause"]) for run in runs] == [(1, "user_code")]
    assert list((folder / "out/checkpoints").glob("step-000000000005-*/manifest.json"))


@pytest.mark.ray
def test_a_failed_run_is_resumed_by_hand_on_a_private_ray(failed):
    """The optimizer has no state, as without momentum."""
    folder, _ = failed
    again = run("spec.yaml", "--output", "out", cwd=folder)
    assert again.returncode == 2
    assert "must be an empty folder" in again.stderr
    (folder / "fragile").unlink()
    result = run("spec.yaml", "--output", "out", "--resume", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming from step-000000000005" in result.stdout
    assert "step 20/20" in result.stdout
    assert "model.pt: best model, step 5" in result.stdout
    attempt = folder / "out/attempt-2"
    outcome = Outcome.model_validate_json((attempt / OUTCOME_FILE).read_text())
    assert (outcome.state, outcome.step) == ("succeeded", 20)
    assert 0 <= outcome.metrics["accuracy"] <= 1
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 5, 10, 15, 20]
    assert (attempt / "figures/accuracy.png").exists()
    assert (attempt / "model.pt").stat().st_size > 0
    assert (attempt / "model-last.pt").stat().st_size > 0
    assert not (attempt / LOG_FILE).exists()
