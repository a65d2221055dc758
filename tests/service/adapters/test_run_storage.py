import os

import pytest

from service.adapters.run_storage import MAX_JSON_BYTES, MAX_READ_BYTES, MAX_REASON_CHARS
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
