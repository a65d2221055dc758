"""All that MLflow is to hold, on its way there: lines in a file, which a thread of `trainer.tracking` drains.

The training loop never waits for MLflow: it appends a line. The outbox belongs to the job and not to one attempt: a later attempt
sends what an earlier one could not, and does not log a step again that is there already. Lines keep the time they were written at,
so sending one twice changes nothing in MLflow.
"""

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

OUTBOX_FILE = "metrics.jsonl"
Kind = Literal["evaluation", "probes", "system"]


class Outbox:
    """Append-only file of lines, each a JSON object with a `kind`; may be written to by several threads."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / OUTBOX_FILE
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # an attempt that was killed may have left half a line
        self._last_step: dict[str, int] = {}
        for line in map(json.loads, whole):
            if "step" in line:
                self._last_step[line["kind"]] = line["step"]
        self._file = self.path.open("r+" if lines else "w")
        self.length = sum(map(len, whole))
        """Bytes written."""
        self._file.truncate(self.length)
        self._file.seek(0, os.SEEK_END)
        self._lock = threading.Lock()

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
            self.length += len(text)
