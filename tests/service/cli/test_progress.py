"""Ctrl-C while a command waits: it exits with 130 and a hint, and the job continues."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import yaml

from tests.service.running_api import SPEC, TOKEN


@pytest.fixture
def started(api, tmp_path):
    """Start the command in its own process, as a terminal does."""
    environment = os.environ | {"SYNCBN_URL": api.url, "SYNCBN_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    processes = []

    def start(*arguments, stdout=-1):
        command = [sys.executable, "-m", "service.cli.app", *map(str, arguments)]
        processes.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=-1, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def interrupt(process):
    """Send SIGINT once the command waits."""
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert "Traceback" not in stderr
    return process.returncode, stderr


def test_interrupting_a_followed_log(api, started):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "one\n")
    process = started("logs", "-f", job_id)
    assert process.stdout.readline() == "one\n"
    assert interrupt(process) == (130, f"\n{job_id} continues; `syncbn cancel {job_id}` ends it.\n")
    with api.client() as client:
        job = client.job(job_id)
    assert (job.state, job.cancel_requested) == ("submitted", False)


@pytest.mark.parametrize("arguments", [("submit", "--wait"), ("compare",)])
def test_interrupting_a_wait(api, started, tmp_path, arguments):
    content = SPEC if "submit" in arguments else {"spec": SPEC, "matrix": {"norm": ["none", "sync"]}}
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump(content))
    process = started(*arguments, file)
    made = process.stdout.readline().partition(":")[0]
    code, stderr = interrupt(process)
    assert code == 130
    assert f"{made} continues;" in stderr
    assert f"`syncbn cancel {made}` ends it." in stderr
    with api.client() as client:
        jobs = [client.job(made)] if made.startswith("job-") else client.comparison(made).jobs
    assert {(job.state, job.cancel_requested) for job in jobs} == {("queued", False)}


def test_a_progress_bar_is_one_line_on_a_terminal_and_only_its_end_in_a_file(api, started):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "start\n\r 10%|#")
    terminal, process_end = pty.openpty()
    live, plain = started("logs", "-f", job_id, stdout=process_end), started("logs", "-f", job_id)
    os.close(process_end)
    seen = read_until(terminal, b"10%|#")
    api.write(job_id, "\r 20%|##\x1b[31m")
    seen += read_until(terminal, b"20%|##")
    api.write(job_id, "\r100%\n")
    api.move(job_id, "failed")
    assert plain.communicate(timeout=20)[0] == "start\n100%\n"
    live.communicate(timeout=20)
    with suppress(OSError):  # the end of a terminal on Linux
        while part := os.read(terminal, 4096):
            seen += part
    os.close(terminal)
    parts = [part for part in seen.decode().split("\r\x1b[K") if part]
    assert parts == ["start\r\n", " 10%|#", " 20%|##\\x1b[31m", "100%\r\n"]


def read_until(terminal, text):
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 4096)
    return seen


def test_a_closed_pipe_ends_the_command_silently(api, started):
    job_id = api.submit()
    api.move(job_id, "submitted")
    api.write(job_id, "one\n" * 50_000)
    process = started("logs", "-f", job_id)
    process.stdout.readline()
    process.stdout.close()
    process.wait(20)
    assert process.stderr.read() == ""
