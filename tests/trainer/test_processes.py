import json
import signal
import subprocess
import sys

import pytest

from trainer.processes import describe_status

PROGRAM = """
import json, subprocess, sys, time
from trainer.processes import Descendants
descendants = Descendants()
child = subprocess.Popen(sys.argv[1:])
if sys.argv[1] == "sleep":
    descendants.stop(child.pid, 5)
else:
    descendants.wait_for_end(child.pid, 5)
print(json.dumps([descendants.ended.get(child.pid), descendants.end()]))
"""


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sleep", "60"], -signal.SIGTERM),
        (["sh", "-c", "kill -9 $$"], -signal.SIGKILL),
        (["sh", "-c", "setsid sleep 60 & exit 0"], 0),
    ],
)
def test_the_status_of_a_child_is_returned_and_descendants_end(command, status):
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(answer.stdout) == [status, []]


def test_exit_statuses_are_described():
    assert describe_status(3) == "ended with status 3"
    assert describe_status(-9) == "was killed by signal 9 (Killed)"
