import json

import pytest

from tests.trainer.factories import make_spec
from trainer.driver.history import HISTORY_FILE, RunHistory, checkpoint_folder
from trainer.jobspec import AttemptContext, AttemptTask, Outcome


def make_task(folder, attempt=1, **changes):
    context = AttemptContext(job_id="job-1", attempt=attempt, name="x", folder=str(folder))
    return AttemptTask(spec=make_spec(**changes), context=context)


def test_each_worker_group_run_is_recorded_with_its_end(tmp_path):
    history = RunHistory(str(tmp_path), make_task(tmp_path))
    history.restart(Outcome(state="failed", reason="a worker was lost", cause="worker_lost"))
    RunHistory(str(tmp_path), make_task(tmp_path, attempt=2)).end(Outcome(state="succeeded", reason="done"))
    runs = json.loads((tmp_path / HISTORY_FILE).read_text())["worker_group_runs"]
    assert [run["attempt"] for run in runs] == [1, 1, 2]
    assert [run["outcome"] and run["outcome"]["state"] for run in runs] == ["failed", None, "succeeded"]


def test_a_file_with_the_earlier_field_name_is_continued(tmp_path):
    earlier = {"attempt": 1, "began_seconds": 1.5, "ended_seconds": None, "outcome": None}
    (tmp_path / HISTORY_FILE).write_text(json.dumps({"job_id": "job-1", "tries": [earlier]}))
    RunHistory(str(tmp_path), make_task(tmp_path, attempt=2))
    content = json.loads((tmp_path / HISTORY_FILE).read_text())
    assert content.keys() == {"job_id", "worker_group_runs"}
    assert [run["attempt"] for run in content["worker_group_runs"]] == [1, 2]


@pytest.mark.parametrize("content", ["", "{}", '{"job_id": 3}'])
def test_an_unreadable_file_is_replaced(tmp_path, content):
    (tmp_path / HISTORY_FILE).write_text(content)
    RunHistory(str(tmp_path), make_task(tmp_path))
    assert len(json.loads((tmp_path / HISTORY_FILE).read_text())["worker_group_runs"]) == 1


def test_checkpoints_are_in_the_folder_of_the_job_or_at_an_address(tmp_path):
    task = make_task(tmp_path / "job-1")
    assert checkpoint_folder(task) == str(tmp_path / "job-1" / "checkpoints")
    assert checkpoint_folder(task, "job-0") == str(tmp_path / "job-0" / "checkpoints")
    remote = make_task(tmp_path, checkpoint={"address": "s3://bucket/runs/"})
    assert checkpoint_folder(remote) == "s3://bucket/runs/job-1"
    assert checkpoint_folder(remote, "job-0") == "s3://bucket/runs/job-0"
