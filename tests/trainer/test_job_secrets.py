import os
import subprocess
import sys
import traceback

import pytest

from trainer.errors import ConfigurationError
from trainer.job_secrets import set_variables
from trainer.spec import JOB_VARIABLE, LOG_FILE, OUTCOME_FILE, JobSpec, Outcome, Permissions, RunContext, Task

VALUE = "a-value-that-nobody-may-see"


@pytest.fixture
def secret(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "before")
    path = tmp_path / "ann" / "secret"
    path.parent.mkdir()
    path.write_text(VALUE + "\n")
    path.chmod(0o600)
    return path


def test_a_variable_holds_what_the_file_holds(secret, capsys):
    set_variables({"A_SECRET": str(secret)})
    assert os.environ["A_SECRET"] == VALUE
    assert capsys.readouterr().out == ""


def test_a_file_that_everybody_can_read_is_told_and_its_value_is_not(secret, capsys):
    secret.chmod(0o644)
    set_variables({"A_SECRET": str(secret)})
    told = capsys.readouterr().out
    assert str(secret) in told
    assert VALUE not in told


@pytest.mark.parametrize("content", [None, b"\xff\xfe" + VALUE.encode(), f"{VALUE}\0".encode()])
def test_what_cannot_be_read_is_the_jobs_configuration(secret, content):
    if content is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"secrets\.A_SECRET") as caught:
        set_variables({"A_SECRET": str(secret)})
    assert VALUE not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None
    assert os.environ["A_SECRET"] == "before"


def test_a_link_out_of_the_folder_is_refused(secret, tmp_path):
    (tmp_path / "outside").write_text(VALUE)
    secret.unlink()
    secret.symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigurationError, match="no link out of its folder"):
        set_variables({"A_SECRET": str(secret)})


MODEL = """
import os
import torch

def keyed(classes):
    assert os.environ["A_SECRET"] == open(os.environ["EXPECTED"]).read().strip()
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
"""


@pytest.mark.ray
def test_each_worker_has_it_and_no_file_of_the_run_does(secret, tmp_path):
    (tmp_path / "models.py").write_text(MODEL)
    spec = {
        "model": {"name": "import:models:keyed", "arguments": {"classes": 10}},
        "data": {"name": "digits"},
        "num_workers": 2,
        "steps": 4,
        "eval_every": 2,
    }
    context = RunContext(
        job_id="job-1",
        attempt=1,
        name="secret",
        folder=str(tmp_path / "job-1"),
        permissions=Permissions(everything=True),
        secrets={"A_SECRET": str(secret)},
    )
    task = Task(spec=JobSpec.model_validate(spec), context=context)
    environment = os.environ | {JOB_VARIABLE: task.model_dump_json(), "EXPECTED": str(secret)}
    result = subprocess.run(
        [sys.executable, "-m", "trainer"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    folder = tmp_path / "job-1" / "attempt-1"
    told = result.stdout + result.stderr + (folder / LOG_FILE).read_text()
    assert Outcome.model_validate_json((folder / OUTCOME_FILE).read_text()).state == "succeeded", told
    written = [path for path in (tmp_path / "job-1").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not any(VALUE.encode() in path.read_bytes() for path in written)
    assert VALUE not in told
