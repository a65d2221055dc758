import json
import os

import pytest

from service.adapters.run_storage import MAX_JSON_BYTES, MAX_READ_BYTES, MAX_REASON_CHARS, Point
from tests.service.adapters.storage import GOOD, read_log
from trainer.jobspec import (
    LOG_INDEX_FILE,
    OUTBOX_FILE,
    OUTCOME_FILE,
    PROGRESS_FILE,
    Outcome,
)


def test_huge_files_are_not_loaded_into_memory(files, job, folder):
    """Sparse files of 4 TB that occupy no disk space."""
    for path in (folder / OUTCOME_FILE, folder / LOG_INDEX_FILE, folder.parent / OUTBOX_FILE):
        path.touch()
        os.truncate(path, 1 << 42)
    assert files.outcome(job) is None
    assert files.metrics(job, 0) == ([], MAX_READ_BYTES)
    assert read_log(folder) == []


def test_an_outcome_of_maximum_length_is_read(files, job, folder):
    (folder / OUTCOME_FILE).write_text(GOOD + " " * (MAX_JSON_BYTES - len(GOOD)))
    assert files.outcome(job) is not None


def test_an_outcome_can_be_stored(files, job, folder):
    reason = "\0" + "a" * 1_000_000
    (folder / OUTCOME_FILE).write_text(Outcome(state="failed", reason=reason).model_dump_json())
    assert files.outcome(job).reason == "\ufffd" + "a" * (MAX_REASON_CHARS - 1)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_invalid_progress_is_ignored(files, job, folder, value):
    """PostgreSQL would reject it, and the job could not be finalized."""
    progress = f'{{"step": 1, "total_steps": 2, "samples_per_second": {value}, "eta_seconds": 1}}'
    (folder / PROGRESS_FILE).write_text(progress)
    assert files.progress(job) is None


def test_files_of_a_later_version_are_read(files, job, folder):
    later = {"of_a_later_version": {"x": 1}}
    outcome = {"state": "failed", "reason": "no", "cause": "of a later version"}
    (folder / OUTCOME_FILE).write_text(json.dumps(outcome | later))
    assert files.outcome(job) == Outcome(state="failed", reason="no", cause="unknown")
    progress = {"step": 1, "total_steps": 2, "samples_per_second": 3.0, "eta_seconds": 1.0}
    (folder / PROGRESS_FILE).write_text(json.dumps(progress | later))
    assert files.progress(job).step == 1
    point = {"step": 1, "metrics": {"accuracy": 0.5}}
    (folder.parent / OUTBOX_FILE).write_text(
        json.dumps({"a kind of a later version": 1}) + "\n" + json.dumps(point | later) + "\n"
    )
    assert files.metrics(job, 0)[0] == [Point(1, {"accuracy": 0.5})]
