"""Outbox: file of metrics that wait for upload to MLflow.

The training loop never waits for MLflow: it appends a line. The outbox belongs to the job and not to one attempt: a later attempt
sends what an earlier one could not, and does not log a step again that is there already. Lines keep the time they were written at,
so sending one twice changes nothing in MLflow.
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
    """Append-only file of lines, each a JSON object with a `kind`; may be written to by several threads."""

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
        # Appending alone: whoever else still writes here cannot overwrite, nor be overwritten.
        self._file = self.path.open("a")
        if content and not content.endswith(b"\n"):
            self._file.write("\n")  # ends the half line that an attempt left when it was killed
        self._lock = threading.Lock()

    def belong_to(self, identity: Mapping[str, str]) -> None:
        """Begin, or go on, for a run of this identity. Raises ConfigurationError if an attempt before was another run's.

        Metrics of two runs in one place could not be distinguished afterwards.
        """
        if self._identity is None:
            self._identity = dict(identity)
            self._append({"kind": "identity", "identity": self._identity})
        for field in sorted(self._identity.keys() | identity.keys()):
            if self._identity.get(field) != identity.get(field):
                start = self._identity.get(field)
                takes = f"must be as at the start of this run, {start}, whose metrics are in {self.path}"
                raise ConfigurationError(field, identity.get(field), takes)

    def log(self, step: int, metrics: Mapping[str, float], kind: Kind = "evaluation") -> None:
        """Append metrics measured after `step` steps, unless an earlier attempt already did for this step and kind."""
        if step > self._last_step.get(kind, -1):
            self._last_step[kind] = step
            self._append(
                {"kind": kind, "step": step, "timestamp": time.time_ns() // 1_000_000, "metrics": dict(metrics)}
            )

    def next_step(self, kind: Kind) -> int:
        """The step after the last one of a kind, for what is numbered and not measured by steps."""
        return self._last_step.get(kind, -1) + 1

    def put(self, kind: Literal["tags", "dataset", "artifact", "model"], **content: Any) -> None:
        """Append something else: `tags` name to text; `dataset` name, digest, source; `artifact` path; `model` path and step."""
        self._append({"kind": kind, **content})

    def close(self) -> None:
        """Close the file; what is in it stays."""
        with self._lock:
            self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        with self._lock:
            self._file.write(text)
            self._file.flush()


def read_lines(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the lines that can be read; half a line, or what a loss of power has left, is passed by."""
    for text in content.splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "kind" in line:
                yield line
