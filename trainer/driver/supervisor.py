"""Supervisor of one process: exit status, and end of its descendants.

Ray starts each worker as `python -m trainer.driver.supervisor COMMAND...` (its `py_executable`), since Ray
does not report the exit status of a worker. Imports neither torch nor pydantic, since there is one supervisor
per worker.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from trainer.atomic import atomic_write
from trainer.processes import Descendants, die_with_parent

EXITS_VARIABLE = "SYNCBN_EXITS"
"""Environment variable with the folder of exit records."""
DEFAULT_PREFIX = "SYNCBN_DEFAULT_"
"""Prefix of environment variables that hold defaults: values for variables that a node has not set."""
POLL_SECONDS = 1.0
WINDOW_POLLS = 10
"""Number of polls for which an out-of-memory kill counts: a large process takes some seconds to end."""
ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """Exit record of one process."""

    host: str
    pid: int
    status: int
    """Exit code, or the negative number of a signal."""
    out_of_memory: bool = False
    """Whether the kernel counted an out-of-memory kill in the control group of the process just before."""
    orphaned: bool = False
    """Whether the parent of the supervisor, such as Ray's raylet, ended first."""
    stopped: bool = False
    """Whether the supervisor received a stop signal before the process ended."""
    seconds: float
    """Time of the exit, in seconds since 1970."""


def supervise(
    descendants: Descendants, pid: int, started_by: psutil.Process | None, *, forward: bool = True
) -> ProcessExit:
    """Wait for the end of child `pid`; kill it if this process's parent ends.

    With `forward`, a stop signal is passed on to the child, as SIGTERM.
    """
    parent = os.getppid()
    kills = deque([count_oom_kills(pid)], maxlen=WINDOW_POLLS)
    stopped = False
    while pid not in descendants.ended:
        is_asked = descendants.wait(timeout_seconds=POLL_SECONDS)
        stopped |= is_asked
        if pid not in descendants.ended:
            kills.append(count_oom_kills(pid))
            if os.getppid() != parent:
                os.kill(pid, signal.SIGKILL)
            elif is_asked and forward:
                os.kill(pid, signal.SIGTERM)
    status = descendants.ended[pid]
    return ProcessExit(
        host=socket.gethostname(),
        pid=pid,
        status=status,
        out_of_memory=status == -signal.SIGKILL and count_oom_kills(os.getpid()) > kills[0],
        orphaned=started_by is None or not _is_alive(started_by),
        stopped=stopped,
        seconds=time.time(),
    )


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def count_oom_kills(pid: int, root: Path = ROOT) -> int:
    """Return the number of out-of-memory kills that the kernel has counted.

    The count is that of the process's memory control group, or of the whole machine.
    """
    with suppress(OSError):
        for line in (root / f"proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            below, file = ("", "memory.events") if not controllers else ("memory", "memory.oom_control")
            if not controllers or "memory" in controllers.split(","):
                for group in (path, "/"):  # inside a container, its group may be the root
                    with suppress(OSError):
                        return _oom_kills_of(
                            (root / "sys/fs/cgroup" / below / group.lstrip("/") / file).read_text()
                        )
    with suppress(OSError):
        return _oom_kills_of((root / "proc/vmstat").read_text())
    return 0


def _oom_kills_of(text: str) -> int:
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def with_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment, and its defaults for variables that it lacks."""
    defaults = {
        name.removeprefix(DEFAULT_PREFIX): value
        for name, value in environment.items()
        if name.startswith(DEFAULT_PREFIX)
    }
    return defaults | dict(environment)


def main() -> int:
    """Run a command as a child, record its exit, and exit with its status."""
    started_by = psutil.Process().parent()
    descendants = Descendants()
    # Ray kills the process group of an ended worker, so the child gets another one. Ray's descriptors are
    # passed on. `preexec_fn` is safe: there are no threads yet.
    child = subprocess.Popen(
        sys.argv[1:],
        env=with_defaults(os.environ),
        close_fds=False,
        process_group=0,
        preexec_fn=die_with_parent,
    )
    ended = supervise(descendants, child.pid, started_by)
    with suppress(OSError, KeyError):
        record = Path(os.environ[EXITS_VARIABLE]) / f"exit-{ended.host}-{ended.pid}.json"
        atomic_write(record, json.dumps(asdict(ended)), durable=False)
    descendants.end()
    return ended.status if ended.status >= 0 else 128 - ended.status


if __name__ == "__main__":
    sys.exit(main())
