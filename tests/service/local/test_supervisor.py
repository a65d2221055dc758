"""The keeper on cheap parts: whatever is killed, nothing is left."""

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
# Children of each kind that escapes a simple kill: in a session of its own, orphaned at once, deaf to SIGTERM, and all three.
FAMILY = """
sleep 300 &
setsid sleep 300 &
(sleep 300 &)
(setsid sh -c 'trap "" TERM; sleep 300 & touch family-complete; wait' &)
wait
"""
ASKER = """
import json, sys
from pathlib import Path
from service.local.supervisor import Plan, ProcessSpec, SupervisorHandle

fields = json.loads(sys.argv[1])
plan = Plan(**fields | {"parts": [ProcessSpec(**part) for part in fields["parts"]]})
kept = SupervisorHandle(plan, log=Path(plan.directory) / "keeper.log")
while len(kept.process_ids) < len(plan.parts):
    assert not kept.ended.wait(0.01), kept.reason
print(json.dumps(kept.process_ids), flush=True)
kept.ended.wait()
kept.stop()
print(kept.reason, flush=True)
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
    return Plan(parts=parts, directory=str(directory))


@pytest.fixture
def asker(tmp_path):
    """A process that asked for a quiet part and a large family, and everything that it brought to life."""
    wanted = plan(tmp_path, part(tmp_path, "quiet", "exec sleep 300"), part(tmp_path, "family", FAMILY))
    fields = json.dumps({"parts": [vars(kept) for kept in wanted.parts], "directory": wanted.directory})
    process = subprocess.Popen([sys.executable, "-c", ASKER, fields], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        process_ids = json.loads(process.stdout.readline())
        wait_for_file(tmp_path / "family-complete")
        yield process, process_ids
        process.kill()
    process.wait()
    assert still_alive(working_in(tmp_path), STOP_LIMIT_SECONDS) == []


@pytest.mark.parametrize(
    ("victim", "reason"),
    [
        ("asker", None),
        ("guard", "the keeper of the processes ended without a word"),
        ("keeper", "the keeper of the processes was killed by signal 9 (Killed)"),
        ("quiet", "quiet was killed by signal 9 (Killed)"),
        ("family", "family was killed by signal 9 (Killed)"),
    ],
)
def test_nothing_survives_a_kill(asker, tmp_path, victim, reason):
    process, process_ids = asker
    (guard,) = psutil.Process(process.pid).children()
    (keeper,) = guard.children()
    everything = [guard, keeper, *keeper.children(recursive=True)]
    # Both parts, `sleep` for each of the four ways out, and the shell that is deaf to SIGTERM.
    assert len(everything) == 2 + 2 + 5
    os.kill({"asker": process.pid, "guard": guard.pid, "keeper": keeper.pid, **process_ids}[victim], signal.SIGKILL)
    assert still_alive(everything, STOP_LIMIT_SECONDS) == []
    assert working_in(tmp_path) == []
    if reason is not None:
        assert process.stdout.readline().strip() == reason


def test_stop_goes_from_the_last_part_to_the_first(tmp_path):
    def script(name):
        return f'trap "echo {name} >> order; exit 0" TERM; touch {name}; sleep 300 & wait'

    kept = SupervisorHandle(
        plan(tmp_path, *(part(tmp_path, name, script(name)) for name in "abc")), log=tmp_path / "keeper.log"
    )
    for name in "abc":
        wait_for_file(tmp_path / name)
    assert not kept.ended.is_set()
    kept.stop()
    assert (tmp_path / "order").read_text().split() == ["c", "b", "a"]
    assert kept.ended.is_set()
    assert kept.reason is None
    assert working_in(tmp_path) == []


def test_part_that_ignores_sigterm_is_killed(tmp_path):
    deaf = part(tmp_path, "deaf", 'trap "" TERM; touch deaf; sleep 300', stop_seconds=0.2)
    kept = SupervisorHandle(plan(tmp_path, deaf), log=tmp_path / "keeper.log")
    wait_for_file(tmp_path / "deaf")
    kept.stop()
    assert working_in(tmp_path) == []


def test_reason_tells_the_exit_status_and_the_log_has_the_output(tmp_path):
    kept = SupervisorHandle(
        plan(
            tmp_path, part(tmp_path, "quiet", "sleep 300"), part(tmp_path, "broken", "echo no such thing >&2; exit 3")
        ),
        log=tmp_path / "keeper.log",
    )
    assert kept.ended.wait(STOP_LIMIT_SECONDS)
    kept.stop()
    assert (kept.dead_part, kept.reason) == ("broken", "broken ended with status 3")
    assert (tmp_path / "broken.log").read_text() == "no such thing\n"


def test_part_that_cannot_be_started_stops_the_rest(tmp_path):
    missing = ProcessSpec(
        name="missing", command=["/no/such/program"], environment={}, log=str(tmp_path / "missing.log")
    )
    kept = SupervisorHandle(plan(tmp_path, part(tmp_path, "quiet", "sleep 300"), missing), log=tmp_path / "keeper.log")
    assert kept.ended.wait(STOP_LIMIT_SECONDS)
    kept.stop()
    assert kept.reason.startswith("missing could not be started: [Errno 2]")
    assert working_in(tmp_path) == []


def test_paths_are_removed_at_the_end(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    removed = [str(tmp_path / name) for name in ("folder", "file", "never-made")]
    kept = SupervisorHandle(Plan(parts=[], directory=str(tmp_path), remove=removed), log=tmp_path / "keeper.log")
    kept.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keeper.log"]
    assert (tmp_path / "keeper.log").read_text() == ""


def test_the_end_of_a_vital_child_is_that_of_its_part(tmp_path):
    """The part itself would not notice: it waits for another child."""
    indifferent = replace(part(tmp_path, "indifferent", "sleep 300 & sleep 301 & wait"), required_children=["sleep"])
    kept = SupervisorHandle(plan(tmp_path, indifferent), log=tmp_path / "keeper.log")
    try:
        deadline = time.monotonic() + STOP_LIMIT_SECONDS
        while not kept.process_ids or len(children := psutil.Process(kept.process_ids["indifferent"]).children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # The keeper looks once a second; a child that comes and goes between two looks was never seen.
        time.sleep(1.5)
        children[0].kill()
        assert kept.ended.wait(STOP_LIMIT_SECONDS)
        assert kept.reason == "indifferent lost its sleep"
        assert still_alive(children, STOP_LIMIT_SECONDS) == []
    finally:
        kept.stop()


def test_the_child_that_ended_first_is_named_and_not_one_that_followed(tmp_path):
    """As Ray's head does, the part ends the others once one has ended."""
    command = ["bash", "-c", "sleep 300 & tail -f /dev/null & wait -n; sleep 0.2; kill %1 %2; sleep 301"]
    vital = replace(part(tmp_path, "ray", ""), command=command, required_children=["sleep", "tail"])
    kept = SupervisorHandle(plan(tmp_path, vital), log=tmp_path / "keeper.log")
    try:
        deadline = time.monotonic() + STOP_LIMIT_SECONDS
        while not kept.process_ids or len(children := psutil.Process(kept.process_ids["ray"]).children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1.5)  # see above
        next(child for child in children if child.name() == "tail").kill()
        assert kept.ended.wait(STOP_LIMIT_SECONDS)
        assert kept.reason == "ray lost its tail"
    finally:
        kept.stop()
