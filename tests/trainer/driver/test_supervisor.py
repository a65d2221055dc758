import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.processes import still_alive, wait_for_file, working_in
from trainer.driver.supervisor import EXITS_VARIABLE, count_oom_kills

DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w'); time.sleep(300)"
)
"""Process that ignores SIGTERM, and reports it."""


def supervise(folder, code):
    command = [sys.executable, "-m", "trainer.driver.supervisor", sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {EXITS_VARIABLE: str(folder)})


def exit_in(folder):
    (path,) = folder.glob("exit-*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("code", "status", "returned"),
    [
        ("pass", 0, 0),
        ("import os; os._exit(7)", 7, 7),
        ("import ctypes; ctypes.CDLL(None)._exit(5)", 5, 5),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, 128 + signal.SIGSEGV),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, 128 + signal.SIGKILL),
    ],
)
def test_the_exit_status_is_recorded_and_returned(tmp_path, code, status, returned):
    assert supervise(tmp_path, code).wait(20) == returned
    ended = exit_in(tmp_path)
    assert ended["status"] == status
    assert not any(ended[flag] for flag in ("out_of_memory", "orphaned", "stopped"))


def test_a_child_in_its_own_session_that_ignores_sigterm_ends_with_its_parent(tmp_path):
    code = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {DEAF!r}], start_new_session=True)
while not os.path.exists("deaf"):
    time.sleep(0.01)
os._exit(7)
"""
    assert supervise(tmp_path, code).wait(20) == 7
    assert working_in(tmp_path) == []


def test_a_stop_signal_is_passed_on(tmp_path):
    process = supervise(tmp_path, "import time; open('started', 'w'); time.sleep(300)")
    wait_for_file(tmp_path / "started")
    process.terminate()
    process.wait(20)
    ended = exit_in(tmp_path)
    assert (ended["status"], ended["stopped"]) == (-signal.SIGTERM, True)


def test_the_process_ends_when_its_supervisor_is_killed(tmp_path):
    process = supervise(tmp_path, "import time; open('started', 'w'); time.sleep(300)")
    wait_for_file(tmp_path / "started")
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait(20)
    assert still_alive([child], 10) == []


def test_a_worker_that_outlives_its_raylet_is_orphaned(tmp_path):
    """Like a worker whose raylet was killed: it ends with its own exit status."""
    code = "import os, time; open('started', 'w'); time.sleep(2); os._exit(1)"
    starter = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "trainer.driver.supervisor", sys.executable, "-c", {code!r}])
time.sleep(300)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", starter], cwd=tmp_path, env=os.environ | {EXITS_VARIABLE: str(tmp_path)}
    )
    wait_for_file(tmp_path / "started")
    left = [child for child in working_in(tmp_path) if child.pid != process.pid]
    process.kill()
    process.wait(20)
    assert still_alive(left, 20) == []
    assert exit_in(tmp_path)["orphaned"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [
        ("0::/jobs/7\n", "jobs/7/memory.events"),
        ("0::/jobs/7\n", "memory.events"),
        ("9:cpu:/\n4:memory:/jobs/7\n0::/\n", "memory/jobs/7/memory.oom_control"),
    ],
)
def test_oom_kills_are_counted_in_the_control_group_of_the_process(tmp_path, cgroup, file):
    write(tmp_path / "proc/7/cgroup", cgroup)
    write(tmp_path / "proc/vmstat", "oom_kill 9\n")
    write(tmp_path / "sys/fs/cgroup" / file, "oom 5\noom_kill 3\noom_group_kill 0\n")
    assert count_oom_kills(7, tmp_path) == 3


def test_without_a_control_group_the_oom_kills_of_the_machine_are_counted(tmp_path):
    assert count_oom_kills(7, tmp_path) == 0
    write(tmp_path / "proc/vmstat", "nr_free_pages 1\noom_kill 9\n")
    write(tmp_path / "proc/7/cgroup", "0::/\n")
    assert count_oom_kills(7, tmp_path) == 9
