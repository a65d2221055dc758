"""Outbox: append-only file of metrics for upload to MLflow.

The training loop does not wait for MLflow but appends a line. The outbox belongs to the job, not to one
attempt: a later attempt uploads what an earlier one could not, and does not log a step again. Lines contain
the time of writing, so sending a line twice has no effect in MLflow.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from trainer.errors import ConfigurationError
from trainer.jobspec import OUTBOX_FILE

Kind = Literal["evaluation", "probes", "system"]


class Outbox:
    """Append-only file of JSON lines, each with a `kind`; thread-safe."""

    def __init__(self, folder: Path, name: str = OUTBOX_FILE) -> None:
        self.path = folder / name
        self._last_step: dict[str, int] = {}
        self._identity: dict[str, str] | None = None
        content = self.path.read_bytes() if self.path.exists() else b""
        for line in read_lines(content):
            if line["kind"] == "identity":
                self._identity = line["identity"]
            elif "step" in line:
                self._last_step[line["kind"]] = line["step"]
        # Append mode: an older process that still writes here can neither overwrite nor be overwritten.
        self._file = self.path.open("a")
        if content and not content.endswith(b"\n"):
            self._file.write("\n")  # ends the incomplete line of a killed attempt
        self._lock = threading.Lock()

    def belong_to(self, identity: Mapping[str, str]) -> None:
        """Set or check the identity of the run.

        Raises ConfigurationError if earlier lines are from another run: metrics of two runs could not be
        distinguished.
        """
        if self._identity is None:
            self._identity = dict(identity)
            self._append({"kind": "identity", "identity": self._identity})
        for field in sorted(self._identity.keys() | identity.keys()):
            if self._identity.get(field) != identity.get(field):
                start = self._identity.get(field)
                rule = f"must be as at the start of this run, {start}; its metrics are in {self.path}"
                raise ConfigurationError(field, identity.get(field), rule)

    def log(self, step: int, metrics: Mapping[str, float], kind: Kind = "evaluation") -> None:
        """Append metrics measured after `step` steps.

        Does nothing if an earlier attempt has logged this step and kind.
        """
        if step > self._last_step.get(kind, -1):
            self._last_step[kind] = step
            self._append(
                {
                    "kind": kind,
                    "step": step,
                    "timestamp": time.time_ns() // 1_000_000,
                    "metrics": dict(metrics),
                }
            )

    def next_step(self, kind: Kind) -> int:
        """Return the step after the last one of a kind that is numbered by itself."""
        return self._last_step.get(kind, -1) + 1

    def put(self, kind: Literal["tags", "dataset", "artifact", "model"], **content: Any) -> None:
        """Append a line that is not metrics.

        Content by kind: `tags`: names with texts; `dataset`: name, digest, source; `artifact`: path; `model`:
        path and step.
        """
        self._append({"kind": kind, **content})

    def close(self) -> None:
        """Close the file, without changing its content."""
        with self._lock:
            self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        with self._lock:
            self._file.write(text)
            self._file.flush()


def read_lines(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the valid lines; skip incomplete ones, as after a loss of power."""
    for text in content.splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "kind" in line:
                yield line
