"""The thread that brings the outbox to MLflow, in batches, as fast as MLflow takes it. The trainer's door to MLflow."""

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from trainer.outbox import Outbox

SENT_FILE = "metrics.sent"
METRICS_PER_CALL = 1_000
"""What MLflow takes in one log_batch."""
SECONDS_BETWEEN_CALLS = 1.0
SECONDS_BEFORE_FIRST_CALL = 5.0
SECONDS_TO_FINISH = 180.0
"""After the last step, for what is still on its way: longer than a restart of MLflow."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Codes of answers that will be the same the next time."""
MODEL_NAME = "model"


class Tracking:
    """Drains an outbox to one run, from where the last attempt came to.

    Use as a context manager: leaving it waits up to 180 seconds until all is sent. `unsent_bytes` of the file then are not in
    MLflow; another attempt would send them. Without an address it does nothing.
    """

    def __init__(self, outbox: Outbox, mlflow_url: str | None, run_id: str | None) -> None:
        self._outbox, self._url, self._run_id = outbox, mlflow_url, run_id or ""
        self._sent_path = outbox.path.with_name(SENT_FILE)
        self._sent = self._read_sent()
        self._finished = threading.Event()
        self._give_up_at = math.inf
        self._thread = threading.Thread(target=self._drain, name="tracking", daemon=True)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of the outbox that MLflow does not have yet; 0 without a run."""
        return self._outbox.length - self._sent if self._run_id else 0

    def __enter__(self) -> "Tracking":
        if self._run_id:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up_at = time.monotonic() + SECONDS_TO_FINISH
        self._finished.set()
        if self._run_id:
            self._thread.join(SECONDS_TO_FINISH + 15)

    def _drain(self) -> None:
        """Send all lines, in order, until the outbox is closed and empty or the time to finish is over."""
        # What it takes is not imported while the run gets under way.
        self._finished.wait(SECONDS_BEFORE_FIRST_CALL)
        # One short try a call: the waiting is done here, where nothing else waits for it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        client = MlflowClient(self._url)
        with self._outbox.path.open("rb") as file:
            while not (self._finished.is_set() and not self.unsent_bytes) and time.monotonic() < self._give_up_at:
                file.seek(self._sent)
                lines = _read(file)
                if not lines:
                    self._finished.wait(SECONDS_BETWEEN_CALLS)
                    continue
                try:
                    _send(client, self._run_id, lines)
                except (MlflowException, OSError) as error:
                    is_final = isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSALS
                    if not is_final:
                        print(f"metrics wait for MLflow: {error}", flush=True)
                        time.sleep(SECONDS_BETWEEN_CALLS)
                        continue
                    print(f"MLflow refused {lines[0]['kind']}, which stays in {self._outbox.path}: {error}", flush=True)
                self._sent = file.tell()
                self._write_sent()

    def _read_sent(self) -> int:
        """Find out how far an earlier attempt came with this run; what was sent and not noted is sent again, to no effect."""
        try:
            run_id, place = self._sent_path.read_text().split()
        except (OSError, ValueError):
            return 0
        return min(int(place), self._outbox.length) if run_id == self._run_id and place.isdigit() else 0

    def _write_sent(self) -> None:
        part = self._sent_path.with_name(f".{SENT_FILE}.part")
        part.write_text(f"{self._run_id} {self._sent}")
        part.replace(self._sent_path)


def _read(file: BinaryIO) -> list[dict[str, Any]]:
    """Read whole lines from where the file stands: metrics as many as one call takes, anything else alone."""
    lines: list[dict[str, Any]] = []
    count = 0
    while True:
        place = file.tell()
        text = file.readline()
        line = json.loads(text) if text.endswith(b"\n") else None
        size = len(line.get("metrics", ())) if line is not None else 0
        is_alone = line is not None and "metrics" not in line
        if line is None or (lines and (is_alone or count + size > METRICS_PER_CALL)):
            file.seek(place)
            return lines
        lines.append(line)
        count += size
        if is_alone:
            return lines


def _send(client: Any, run_id: str, lines: list[dict[str, Any]]) -> None:
    """Send lines of one kind; sending them again changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

    line = lines[0]
    match line["kind"]:
        case "tags":
            client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in line["tags"].items()])
        case "dataset":
            dataset = Dataset(line["name"], line["digest"], "local", json.dumps({"uri": line["source"]}))
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        case "artifact":
            client.log_artifact(run_id, line["path"], line["folder"])
        case "model":
            _send_model(client, run_id, Path(line["path"]), line["step"])
        case _:
            metrics = [
                Metric(name, value, line["timestamp"], line["step"])
                for line in lines
                for name, value in line["metrics"].items()
            ]
            client.log_batch(run_id, metrics=metrics)


def _send_model(client: Any, run_id: str, path: Path, step: int) -> None:
    """Upload a saved model as the run's own; one that an earlier try has begun is gone on with."""
    from mlflow.entities import LoggedModelOutput

    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    models = [model for model in found if model.name == MODEL_NAME]
    model = models[0] if models else client.create_logged_model(experiment_id, MODEL_NAME, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
