"""Files that user code can place on the shared storage where the service expects its own."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.retention import _delete
from tests.service.adapters.storage import GOOD, SECRET, read_log
from trainer.jobspec import (
    CLOSED_FILE,
    LOG_FILE,
    LOG_INDEX_FILE,
    OUTBOX_FILE,
    OUTCOME_FILE,
    TASK_FILE,
    AttemptContext,
    AttemptTask,
    worker_log_file,
)


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "token").write_text(f"{SECRET}\n")
    (folder / LOG_FILE).write_text(f"{SECRET}\n")
    (folder / OUTCOME_FILE).write_text(GOOD)
    return folder


def in_time(work):
    """Call in a thread: opening a pipe would block forever."""
    threads = ThreadPoolExecutor(1)
    try:
        return threads.submit(work).result(5)
    finally:
        threads.shutdown(wait=False)


def test_links_of_a_log_are_not_followed(folder, outside):
    name = worker_log_file(0)
    (folder / name).symlink_to(outside / "token")
    (folder / LOG_FILE).symlink_to(outside / "token")
    (folder / LOG_INDEX_FILE).write_text(f"{name} 1000\n{LOG_FILE} 1000\n")
    assert read_log(folder) == []


def test_the_environment_of_the_service_cannot_be_read_as_a_log(folder):
    (folder / worker_log_file(0)).symlink_to("/proc/self/environ")
    (folder / LOG_INDEX_FILE).write_text(f"{worker_log_file(0)} 100000\n")
    assert read_log(folder) == []


def test_links_of_folders_are_not_followed(files, job, folder, outside):
    (folder / CLOSED_FILE).unlink()
    folder.rmdir()
    folder.symlink_to(outside)
    assert read_log(folder) == []
    assert files.outcome(job) is None
    folder.unlink()
    folder.parent.rmdir()
    folder.parent.symlink_to(outside)
    (outside / OUTBOX_FILE).write_text('{"step": 1, "metrics": {"accuracy": 1}}\n')
    assert files.metrics(job, 0) == ([], 0)


def test_nothing_is_written_through_links(files, job, folder, outside):
    before = {path.name for path in outside.iterdir()}
    (folder / CLOSED_FILE).unlink()
    folder.rmdir()
    folder.symlink_to(outside)
    files.close_attempts(job)
    context = AttemptContext(job_id=job.id, attempt=1, name="a", folder=str(folder.parent))
    files.write_task(AttemptTask(spec=job.spec, context=context))
    assert {path.name for path in outside.iterdir()} == before
    assert {path.name for path in folder.iterdir()} == {CLOSED_FILE, TASK_FILE}
    assert (folder / TASK_FILE).stat().st_mode & 0o777 == 0o600
    assert not folder.is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_only_regular_files_are_opened(files, job, folder, kind, monkeypatch):
    monkeypatch.chdir(folder)  # the path of a socket must be short
    for name in (OUTCOME_FILE, LOG_FILE, LOG_INDEX_FILE, f"../{OUTBOX_FILE}"):
        if kind == "pipe":
            os.mkfifo(name)
        elif kind == "folder":
            os.mkdir(name)
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(name)
    assert in_time(lambda: files.outcome(job)) is None
    assert in_time(lambda: files.metrics(job, 0)) == ([], 0)
    assert in_time(lambda: read_log(folder)) == []


def test_deleting_a_link_keeps_its_target(files, job, folder, outside):
    (folder / CLOSED_FILE).unlink()
    folder.rmdir()
    folder.parent.rmdir()
    folder.parent.symlink_to(outside)
    _delete(files, job.id)
    assert not folder.parent.is_symlink()
    assert (outside / "token").exists()
