"""Supervisor of cheap processes: whichever process is killed, none remains."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from service.local.supervisor import Plan, ProcessSpec, SupervisorHandle
from tests.processes import still_alive, wait_for_file, working_in

STOP_LIMIT_SECONDS = 15
# Children of each kind that escapes a simple kill: in their own session, orphaned immediately, ignoring
# SIGTERM, and all three.
FAMILY = """
sleep 300 &
setsid sleep 300 &
(sleep 300 &)
(setsid sh -c 'trap "" TERM; sleep 300 & touch family-complete; wait' &)
wait
"""
CLIENT = """
import json, sys
from pathlib import Path
from service.local.supervisor import Plan, ProcessSpec, SupervisorHandle

fields = json.loads(sys.argv[1])
plan = Plan(**fields | {"processes": [ProcessSpec(**part) for part in fields["processes"]]})
handle = SupervisorHandle(plan, log=Path(plan.directory) / "supervisor.log")
while len(handle.process_ids) < len(plan.processes):
    assert not handle.ended.wait(0.01), handle.reason
print(json.dumps(handle.process_ids), flush=True)
handle.ended.wait()
handle.stop()
print(handle.reason, flush=True)
"""


def part(directory: Path, name: str, script: str, *, stop_seconds: float = 2.0) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        command=["sh", "-c", script],
        environment=dict(os.environ),
        log=str(directory / f"{name}.log"),
        stop_seconds=stop_seconds,
    )


def plan(directory: Path, *parts: ProcessSpec) -> Plan:
    return Plan(processes=parts, directory=str(directory))


@pytest.fixture
def client(tmp_path):
    """Process that started a simple process and a large process tree, and all of their processes."""
    wanted = plan(tmp_path, part(tmp_path, "quiet", "exec sleep 300"), part(tmp_path, "family", FAMILY))
    fields = json.dumps(
        {
            "processes": [vars(wanted_process) for wanted_process in wanted.processes],
            "directory": wanted.directory,
        }
    )
    process = subprocess.Popen([sys.executable, "-c", CLIENT, fields], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        process_ids = json.loads(process.stdout.readline())
        wait_for_file(tmp_path / "family-complete")
        yield process, process_ids
        process.kill()
    process.wait()
    assert still_alive(working_in(tmp_path), STOP_LIMIT_SECONDS) == []


def family_of(guardian, supervisor):
    return [guardian, supervisor, *supervisor.children(recursive=True)]


@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        ("client", None),
        ("guardian", "the supervisor ended without a message"),
        ("supervisor", "the supervisor was killed by signal 9 (Killed)"),
        ("quiet", "quiet was killed by signal 9 (Killed)"),
        ("family", "family was killed by signal 9 (Killed)"),
    ],
)
def test_no_process_survives_a_kill(client, tmp_path, victim, reason):
    process, process_ids = client
    (guardian,) = psutil.Process(process.pid).children()
    (supervisor,) = guardian.children()
    # Guardian and supervisor, both processes, `sleep` for each of the four cases, and the shell that ignores
    # SIGTERM; a shell that has just forked is there twice for a moment.
    everything = family_of(guardian, supervisor)
    for _ in range(100):
        if len(everything) == 2 + 2 + 5:
            break
        time.sleep(0.05)
        everything = family_of(guardian, supervisor)
    assert len(everything) == 2 + 2 + 5
    os.kill(
        {"client": process.pid, "guardian": guardian.pid, "supervisor": supervisor.pid, **process_ids}[
            victim
        ],
        signal.SIGKILL,
    )
    assert still_alive(everything, STOP_LIMIT_SECONDS) == []
    assert working_in(tmp_path) == []
    if reason is not None:
        assert process.stdout.readline().strip() == reason


def test_stop_runs_in_reverse_order(tmp_path):
    def script(name):
        return f'trap "echo {name} >> order; exit 0" TERM; touch {name}; sleep 300 & wait'

    handle = SupervisorHandle(
        plan(tmp_path, *(part(tmp_path, name, script(name)) for name in "abc")),
        log=tmp_path / "supervisor.log",
    )
    for name in "abc":
        wait_for_file(tmp_path / name)
    assert not handle.ended.is_set()
    handle.stop()
    assert (tmp_path / "order").read_text().split() == ["c", "b", "a"]
    assert handle.ended.is_set()
    assert handle.reason is None
    assert working_in(tmp_path) == []


def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
    deaf = part(tmp_path, "deaf", 'trap "" TERM; touch deaf; sleep 300', stop_seconds=0.2)
    handle = SupervisorHandle(plan(tmp_path, deaf), log=tmp_path / "supervisor.log")
    wait_for_file(tmp_path / "deaf")
    handle.stop()
    assert working_in(tmp_path) == []


def test_the_reason_has_the_exit_status_and_the_log_the_output(tmp_path):
    handle = SupervisorHandle(
        plan(
            tmp_path,
            part(tmp_path, "quiet", "sleep 300"),
            part(tmp_path, "broken", "echo no such thing >&2; exit 3"),
        ),
        log=tmp_path / "supervisor.log",
    )
    assert handle.ended.wait(STOP_LIMIT_SECONDS)
    handle.stop()
    assert (handle.dead_process, handle.reason) == ("broken", "broken ended with status 3")
    assert (tmp_path / "broken.log").read_text() == "no such thing\n"


def test_a_process_that_cannot_start_stops_the_rest(tmp_path):
    missing = ProcessSpec(
        name="missing", command=["/no/such/program"], environment={}, log=str(tmp_path / "missing.log")
    )
    handle = SupervisorHandle(
        plan(tmp_path, part(tmp_path, "quiet", "sleep 300"), missing), log=tmp_path / "supervisor.log"
    )
    assert handle.ended.wait(STOP_LIMIT_SECONDS)
    handle.stop()
    assert handle.reason.startswith("missing could not be started: [Errno 2]")
    assert working_in(tmp_path) == []


def test_paths_are_removed_at_the_end(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    removed = [str(tmp_path / name) for name in ("folder", "file", "never-made")]
    handle = SupervisorHandle(
        Plan(processes=[], directory=str(tmp_path), remove=removed), log=tmp_path / "supervisor.log"
    )
    handle.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["supervisor.log"]
    assert (tmp_path / "supervisor.log").read_text() == ""


def children_of(handle, name):
    """Return the two children of a process once the supervisor has seen them."""
    deadline = time.monotonic() + STOP_LIMIT_SECONDS
    while not handle.process_ids or len(children := psutil.Process(handle.process_ids[name]).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The supervisor polls once a second; a child that comes and goes in between is not seen.
    time.sleep(1.5)
    return children


def test_the_exit_of_a_required_child_ends_its_process(tmp_path):
    """The process itself would not notice: it waits for another child."""
    indifferent = replace(
        part(tmp_path, "indifferent", "sleep 300 & sleep 301 & wait"), required_children=["sleep"]
    )
    handle = SupervisorHandle(plan(tmp_path, indifferent), log=tmp_path / "supervisor.log")
    try:
        children = children_of(handle, "indifferent")
        children[0].kill()
        assert handle.ended.wait(STOP_LIMIT_SECONDS)
        assert handle.reason == "indifferent lost its sleep"
        assert still_alive(children, STOP_LIMIT_SECONDS) == []
    finally:
        handle.stop()


def test_the_first_child_that_exited_is_named(tmp_path):
    """Like Ray's head, the process ends the other children once one has ended."""
    command = ["bash", "-c", "sleep 300 & tail -f /dev/null & wait -n; sleep 0.2; kill %1 %2; sleep 301"]
    vital = replace(part(tmp_path, "ray", ""), command=command, required_children=["sleep", "tail"])
    handle = SupervisorHandle(plan(tmp_path, vital), log=tmp_path / "supervisor.log")
    try:
        children = children_of(handle, "ray")
        next(child for child in children if child.name() == "tail").kill()
        assert handle.ended.wait(STOP_LIMIT_SECONDS)
        assert handle.reason == "ray lost its tail"
    finally:
        handle.stop()
