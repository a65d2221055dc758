"""Uploader of outboxes to MLflow, in batches.

`python -m trainer.tracking.uploader FOLDER URL RUN_ID` is a process of its own beside rank 0: what MLflow's client imports and
waits for must not hold Python's lock in the middle of a step. Its threads drain the outbox of the run and one of system metrics,
until its standard input ends; then it finishes what is there.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from trainer.jobspec import OUTBOX_FILE
from trainer.tracking.outbox import Outbox, read_lines

SYSTEM_FILE = "system.jsonl"
METRICS_PER_CALL = 1_000
"""What MLflow takes in one log_batch."""
SECONDS_BETWEEN_CALLS = 1.0
SECONDS_TO_FINISH = 180.0
"""After the last step, for what is still on its way: longer than a restart of MLflow."""
SECONDS_WITHOUT_TRAINER = 5.0
"""The same where the trainer was killed: another attempt sends the rest."""
MOST_TRIES = 20
"""For a line that is not metrics, such as an artifact, while MLflow answers: it must not hold up all behind it for ever."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Codes of answers that will be the same the next time."""
MODEL_NAME = "model"
DONE = b"done"


class TrackingProcess:
    """The process, as a context manager: leaving it waits up to 180 seconds until all is sent. Without an address there is none."""

    def __init__(
        self, folder: Path, mlflow_url: str | None, run_id: str | None, mlflow_token: str | None = None
    ) -> None:
        self._command = [sys.executable, "-m", "trainer.tracking.uploader", str(folder), str(mlflow_url), str(run_id)]
        # In its environment, since command lines can be read by every user of the machine.
        self._environment = os.environ | ({"MLFLOW_TRACKING_TOKEN": mlflow_token} if mlflow_token else {})
        self._is_wanted = mlflow_url is not None and run_id is not None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "TrackingProcess":
        if self._is_wanted:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._environment)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(DONE, timeout=SECONDS_TO_FINISH + 30)
        self._process.kill()
        self._process.wait()


class MlflowUploader:
    """Drains one outbox to a run in a thread, from where the last attempt came to, as a context manager.

    Leaving it waits until all is sent, at most for `seconds_to_finish`. `unsent_bytes` of the file then are not in MLflow; another
    attempt would send them.
    """

    def __init__(self, path: Path, mlflow_url: str, run_id: str) -> None:
        self._path, self._url, self._run_id = path, mlflow_url, run_id
        self._sent_path = path.with_suffix(".sent")
        self._sent = self._read_sent()
        self._finished = threading.Event()
        self._give_up_at = math.inf
        self._tries = 0
        self.seconds_to_finish = SECONDS_TO_FINISH
        self._thread = threading.Thread(target=self._drain, name=f"tracking {path.name}", daemon=True)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of the outbox that MLflow does not have yet."""
        return (self._path.stat().st_size if self._path.exists() else 0) - self._sent

    def __enter__(self) -> "MlflowUploader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up_at = time.monotonic() + self.seconds_to_finish
        self._finished.set()
        self._thread.join(self.seconds_to_finish + 15)

    def _drain(self) -> None:
        """Send all lines, in order, until the outbox is closed and empty or the time to finish is over."""
        from mlflow import MlflowClient

        client = MlflowClient(self._url)
        while not (self._finished.is_set() and not self.unsent_bytes) and time.monotonic() < self._give_up_at:
            if not self.unsent_bytes:
                self._finished.wait(SECONDS_BETWEEN_CALLS)
                continue
            with self._path.open("rb") as file:
                file.seek(self._sent)
                lines = _read(file)
                end = file.tell()
            if end == self._sent:  # half a line, whose rest is still to come
                self._finished.wait(SECONDS_BETWEEN_CALLS)
                continue
            if self._try(client, lines):
                self._sent = end
                self._tries = 0
                self._write_sent()
            else:
                time.sleep(SECONDS_BETWEEN_CALLS)

    def _try(self, client: Any, lines: list[dict[str, Any]]) -> bool:
        """Send lines; return whether to go on behind them. Of a batch that is refused, each line is sent alone."""
        from mlflow.exceptions import MlflowException

        if not lines:
            return True
        try:
            _send(client, self._run_id, lines)
        except (MlflowException, OSError) as error:
            code = getattr(error, "error_code", None)
            if code in REFUSALS and len(lines) > 1:
                return all(self._try(client, [line]) for line in lines)
            self._tries += "metrics" not in lines[0] and self._answers(client)
            if code in REFUSALS or isinstance(error, FileNotFoundError) or self._tries >= MOST_TRIES:
                print(f"MLflow refused {lines[0]['kind']}, which stays in {self._path}: {error}", flush=True)
                return True
            print(f"metrics wait for MLflow: {error}", flush=True)
            return False
        return True

    def _answers(self, client: Any) -> bool:
        """Return whether MLflow answers, and therefore refuses this one line."""
        from mlflow.exceptions import MlflowException

        try:
            client.get_run(self._run_id)
        except (MlflowException, OSError) as error:
            return getattr(error, "error_code", None) in REFUSALS
        return True

    def _read_sent(self) -> int:
        """Find out how far an earlier attempt came with this run; what was sent and not noted is sent again, to no effect."""
        try:
            run_id, place = self._sent_path.read_text().split()
        except (OSError, ValueError):
            return 0
        length = self._path.stat().st_size if self._path.exists() else 0
        return min(int(place), length) if run_id == self._run_id and place.isdigit() else 0

    def _write_sent(self) -> None:
        part = self._sent_path.with_name(f".{self._sent_path.name}.part")
        part.write_text(f"{self._run_id} {self._sent}")
        part.replace(self._sent_path)


def _read(file: BinaryIO) -> list[dict[str, Any]]:
    """Read whole lines from where the file stands: metrics as many as one call takes, anything else alone."""
    lines: list[dict[str, Any]] = []
    count = 0
    while True:
        place = file.tell()
        text = file.readline()
        if not text.endswith(b"\n"):
            file.seek(place)
            return lines
        for line in read_lines(text):
            size = len(line.get("metrics", ()))
            is_alone = "metrics" not in line
            if lines and (is_alone or count + size > METRICS_PER_CALL):
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
        case "identity":  # for the outbox itself
            pass
        case "model":
            _send_model(client, run_id, Path(line["path"]), line["step"], line.get("name", MODEL_NAME))
        case _:
            metrics = [
                Metric(name, value, line["timestamp"], line["step"])
                for line in lines
                for name, value in line["metrics"].items()
            ]
            client.log_batch(run_id, metrics=metrics)


def _send_model(client: Any, run_id: str, path: Path, step: int, name: str) -> None:
    """Upload a saved model as the run's own; one that an earlier try has begun is gone on with."""
    from mlflow.entities import LoggedModelOutput

    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    models = [model for model in found if model.name == name]
    model = models[0] if models else client.create_logged_model(experiment_id, name, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])


def main() -> None:
    """Drain until standard input ends, and then what is left."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.tracking.uploader", description="Send a run's outboxes to MLflow."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("url")
    parser.add_argument("run_id")
    arguments = parser.parse_args()
    # One short try a call: the waiting is done by the threads, where nothing else waits for it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.nice(10)  # training goes first
    from trainer.tracking.system_metrics import SystemMetrics

    system = Outbox(arguments.folder, SYSTEM_FILE)
    with ExitStack() as stack:
        drains = [
            stack.enter_context(MlflowUploader(path, arguments.url, arguments.run_id))
            for path in (arguments.folder / OUTBOX_FILE, system.path)
        ]
        with SystemMetrics(system):
            is_done = sys.stdin.buffer.read() == DONE
        if not is_done:
            for drain in drains:
                drain.seconds_to_finish = SECONDS_WITHOUT_TRAINER
    for drain in drains:
        if drain.unsent_bytes:
            print(
                f"{drain.unsent_bytes} bytes of metrics did not reach MLflow; they stay in {arguments.folder}",
                flush=True,
            )


if __name__ == "__main__":
    main()
