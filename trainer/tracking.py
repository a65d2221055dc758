"""Metrics on their way to MLflow: appended to a file, drained by a thread. The trainer's only door to MLflow.

The training loop never waits for MLflow: it appends a line to the outbox. The outbox belongs to the job and not to one attempt:
a later attempt sends what an earlier one could not, and does not log a step again that is there already. Lines keep the time
they were written at, so sending one twice changes nothing in MLflow.
"""

import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUTBOX_FILE = "metrics.jsonl"
METRICS_PER_CALL = 1_000
"""What MLflow takes in one log_batch."""
SECONDS_BETWEEN_CALLS = 1.0
SECONDS_TO_FINISH = 60.0


class Outbox:
    """Append-only file of metrics by step; with an MLflow run, a thread sends its lines there.

    Use as a context manager: leaving it waits up to 60 seconds until all is sent. `unsent` then counts the lines that are not;
    they stay in the file.
    """

    def __init__(self, folder: Path, mlflow_url: str | None = None, run_id: str | None = None) -> None:
        self._path = folder / OUTBOX_FILE
        self._url, self._run_id = mlflow_url, run_id
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # an attempt that was killed may have left half a line
        self._last_step = json.loads(whole[-1])["step"] if whole else -1
        self._written, self._sent = len(whole), 0
        self._file = self._path.open("r+" if lines else "w")
        self._file.truncate(sum(len(line.encode()) for line in whole))
        self._file.seek(0, os.SEEK_END)
        self._finished = threading.Event()
        self._give_up_at = math.inf
        self._thread = threading.Thread(target=self._drain, name="outbox", daemon=True)

    @property
    def unsent(self) -> int:
        """Number of lines that MLflow does not have yet; 0 without an MLflow run."""
        return self._written - self._sent if self._run_id else 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, unless an earlier attempt already did for this step."""
        if step <= self._last_step:
            return
        line = {"step": step, "timestamp": time.time_ns() // 1_000_000, "metrics": dict(metrics)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._last_step = step
        self._written += 1

    def __enter__(self) -> "Outbox":
        if self._run_id:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up_at = time.monotonic() + SECONDS_TO_FINISH
        self._finished.set()
        if self._run_id:
            self._thread.join(SECONDS_TO_FINISH + 15)
        self._file.close()

    def _drain(self) -> None:
        """Send all lines, in order, until the outbox is closed and empty or the time to finish is over."""
        # One short try a call: the waiting is done here, where nothing else waits for it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        import mlflow

        client = mlflow.MlflowClient(self._url)
        with self._path.open() as file:
            while not (self._finished.is_set() and not self.unsent) and time.monotonic() < self._give_up_at:
                start = file.tell()
                lines = self._read(file)
                if lines:
                    try:
                        client.log_batch(
                            self._run_id, metrics=[metric for line in lines for metric in _metrics(mlflow, line)]
                        )
                        self._sent += len(lines)
                        continue
                    except mlflow.exceptions.MlflowException as error:
                        print(f"metrics wait for MLflow: {error}", flush=True)
                        file.seek(start)
                        time.sleep(SECONDS_BETWEEN_CALLS)
                self._finished.wait(SECONDS_BETWEEN_CALLS)

    @staticmethod
    def _read(file: Any) -> list[dict[str, Any]]:
        """Read whole lines from where the file stands, as many as one call takes."""
        lines: list[dict[str, Any]] = []
        count = 0
        while True:
            place = file.tell()
            text = file.readline()
            line = json.loads(text) if text.endswith("\n") else None
            if line is None or count + len(line["metrics"]) > METRICS_PER_CALL:
                file.seek(place)
                return lines
            lines.append(line)
            count += len(line["metrics"])


def _metrics(mlflow: Any, line: dict[str, Any]) -> list[Any]:
    return [
        mlflow.entities.Metric(key, value, line["timestamp"], line["step"]) for key, value in line["metrics"].items()
    ]
