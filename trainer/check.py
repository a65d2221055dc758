"""Checks of specifications that need torch: `python -m trainer.check`.

The service runs it, or connects to it: then one process answers each connection. Each line of standard input
is a JobSpec as JSON; the answer is one line of JSON with `error`, which is null or the `field`, `value` and
`message` of the first problem, and `size`, which is null or the ModelSize of a library model, built on the
meta device without memory for weights.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import ConfigurationError
from trainer.jobspec import (
    ImportedModelSpec,
    JobSpec,
    LibraryModelSpec,
    ModelSize,
    Norm,
    TorchOptimizerSpec,
    TorchvisionDataSpec,
    known_classes,
    known_shape,
)
from trainer.processes import die_with_parent

MAX_BYTES = 6_000_000_000
MAX_SECONDS = 120
"""Time limit of a check, after which the process ends."""
IDLE_SECONDS = 600
"""Time without a check after which the process ends; its client may be gone without a word."""
MAX_CONNECTIONS = 4
"""Maximum number of processes that answer at the same time; other connections are closed."""
DEFAULT_SHAPE, DEFAULT_CLASSES = (3, 224, 224), 10
"""Shape and classes of data whose files would have to be read."""


def check(spec: JobSpec) -> ModelSize | None:
    """Return the size of a library model, or None for other models.

    Raises ConfigurationError if a model, function, optimizer or dataset does not exist or does not accept its
    arguments.
    """
    if isinstance(spec.data, TorchvisionDataSpec):
        from trainer.data.torchvision import find_parts

        find_parts(spec.data)
    if isinstance(spec.optimizer, TorchOptimizerSpec):
        from torch import nn

        from trainer.training.optim import build_optimizer

        build_optimizer(spec.optimizer, nn.Linear(2, 2))
    if isinstance(spec.model, LibraryModelSpec):
        return _check_library_model(spec.model, spec)
    if isinstance(spec.model, ImportedModelSpec):
        from trainer.models.imported import find_function

        find_function(spec.model)
    return None


def _check_library_model(model: LibraryModelSpec, spec: JobSpec) -> ModelSize | None:
    import torch

    from trainer.models.size import measure_size
    from trainer.models.torchvision_timm import build_library_model

    shape, classes = known_shape(spec.data), known_classes(spec.data) or DEFAULT_CLASSES
    try:
        with torch.device("meta"):
            built = build_library_model(model, shape or DEFAULT_SHAPE, classes)
    except ConfigurationError as error:
        # Some builders compute with weights, which the meta device does not have; a worker will check them.
        if error.field == "model.arguments" and not isinstance(error.__cause__, TypeError):
            return None
        raise
    return measure_size(built, shape, has_norms=spec.norm != Norm.NONE)


def answer_lines() -> None:
    """Answer until standard input ends."""
    os.nice(10)
    # Arguments may request any amount of memory; then this process fails, not another one of the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries is not an answer
    signal.alarm(IDLE_SECONDS)
    for line in sys.stdin:
        found: dict[str, Any] = {"error": None, "size": None}
        signal.alarm(MAX_SECONDS)
        try:
            size = check(JobSpec.model_validate_json(line))
        except ConfigurationError as error:
            found["error"] = {"field": error.field, "value": error.value, "message": error.rule}
        except Exception as unexpected:  # such as a module that fails on import; the job's log will show it
            print(f"warning: unchecked spec: {type(unexpected).__name__}: {unexpected}", file=sys.stderr)
        else:
            found["size"] = None if size is None else asdict(size)
        signal.alarm(IDLE_SECONDS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            print(json.dumps(found, default=str), file=answers, flush=True)


def listen(host: str, port: int) -> None:
    """Start a process for each connection, which answers until the connection ends."""
    processes: list[subprocess.Popen[bytes]] = []
    with socket.create_server((host, port)) as server:
        while True:
            connection, _ = server.accept()
            processes = [process for process in processes if process.poll() is None]
            with connection:
                if len(processes) < MAX_CONNECTIONS:
                    command = [sys.executable, "-m", "trainer.check"]
                    # `preexec_fn` is safe: there are no threads.
                    processes.append(
                        subprocess.Popen(
                            command,
                            stdin=connection.fileno(),
                            stdout=connection.fileno(),
                            preexec_fn=die_with_parent,
                        )
                    )


def main() -> None:
    """Answer standard input, or the connections to an address."""
    parser = argparse.ArgumentParser(prog="python -m trainer.check")
    parser.add_argument("--listen", metavar="HOST:PORT")
    options = parser.parse_args()
    if options.listen is None:
        answer_lines()
    else:
        host, _, port = options.listen.rpartition(":")
        listen(host, int(port))


if __name__ == "__main__":
    main()
