"""Uploader of outboxes to MLflow, in batches.

`python -m trainer.tracking.uploader FOLDER URL RUN_ID` is a separate process next to rank 0, so that imports
and waits of MLflow's client do not hold the interpreter lock during a step. Its threads upload the outbox of
the run and one of system metrics until its standard input ends, and then what is left.
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

from trainer.atomic import atomic_write
from trainer.jobspec import OUTBOX_FILE
from trainer.tracking.outbox import Outbox, read_lines

SYSTEM_FILE = "system.jsonl"
METRICS_PER_CALL = 1_000
"""Maximum number of metrics in one call of log_batch."""
UPLOAD_INTERVAL_SECONDS = 1.0
FINISH_TIMEOUT_SECONDS = 180.0
"""Time to upload the rest after the last step, longer than a restart of MLflow."""
ORPHAN_TIMEOUT_SECONDS = 5.0
"""Time to upload the rest if the trainer was killed; another attempt uploads what is left."""
MAX_UPLOAD_ATTEMPTS = 20
"""Maximum number of attempts for a line that is not metrics, such as an artifact, while MLflow answers; later
lines must not wait for it without limit.
"""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
"""Error codes of answers that a retry would not change."""
MODEL_NAME = "model"
DONE = b"done"


class TrackingProcess:
    """Context manager of the upload process; without an address there is none.

    Leaving it waits up to 180 seconds for the end of the upload.
    """

    def __init__(
        self, folder: Path, mlflow_url: str | None, run_id: str | None, mlflow_token: str | None = None
    ) -> None:
        self._command = [
            sys.executable,
            "-m",
            "trainer.tracking.uploader",
            str(folder),
            str(mlflow_url),
            str(run_id),
        ]
        # In the environment, since all users of the machine can read command lines.
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
            self._process.communicate(DONE, timeout=FINISH_TIMEOUT_SECONDS + 30)
        # After the timeout; without effect if the process has ended.
        self._process.kill()
        self._process.wait()


class MlflowUploader:
    """Context manager that uploads one outbox to a run, in a thread.

    It continues where the last attempt stopped. Leaving it waits for the end of the upload, at most
    `seconds_to_finish`. `unsent_bytes` of the file are then not in MLflow; another attempt would upload them.
    """

    def __init__(self, path: Path, mlflow_url: str, run_id: str) -> None:
        self._path, self._url, self._run_id = path, mlflow_url, run_id
        self._sent_path = path.with_suffix(".sent")
        self._sent = self._read_sent()
        self._finished = threading.Event()
        self._give_up_at = math.inf
        self._attempts = 0
        self.seconds_to_finish = FINISH_TIMEOUT_SECONDS
        self._thread = threading.Thread(target=self._drain, name=f"tracking {path.name}", daemon=True)

    @property
    def unsent_bytes(self) -> int:
        """Number of bytes of the outbox that are not in MLflow yet."""
        return (self._path.stat().st_size if self._path.exists() else 0) - self._sent

    def __enter__(self) -> "MlflowUploader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up_at = time.monotonic() + self.seconds_to_finish
        self._finished.set()
        self._thread.join(self.seconds_to_finish + 15)

    def _drain(self) -> None:
        """Upload all lines in order.

        Ends when the outbox is closed and empty, or the time to finish is over.
        """
        from mlflow import MlflowClient

        client = MlflowClient(self._url)
        while not (self._finished.is_set() and not self.unsent_bytes) and time.monotonic() < self._give_up_at:
            if not self.unsent_bytes:
                self._finished.wait(UPLOAD_INTERVAL_SECONDS)
                continue
            with self._path.open("rb") as file:
                file.seek(self._sent)
                lines = _read(file)
                end = file.tell()
            if end == self._sent:  # an incomplete line
                self._finished.wait(UPLOAD_INTERVAL_SECONDS)
                continue
            # Recorded only after the upload: a crash in between repeats lines, which has no effect.
            if self._try(client, lines):
                self._sent = end
                self._attempts = 0
                self._write_sent()
            else:
                time.sleep(UPLOAD_INTERVAL_SECONDS)

    def _try(self, client: Any, lines: list[dict[str, Any]]) -> bool:
        """Upload lines; return whether to continue after them.

        If MLflow rejects a batch, each line is sent separately.
        """
        from mlflow.exceptions import MlflowException

        if not lines:
            return True
        try:
            _send(client, self._run_id, lines)
        except (MlflowException, OSError) as error:
            code = getattr(error, "error_code", None)
            # One invalid metric must not lose the other metrics of its batch.
            if code in REFUSALS and len(lines) > 1:
                return all(self._try(client, [line]) for line in lines)
            self._attempts += "metrics" not in lines[0] and self._answers(client)
            if (
                code in REFUSALS
                or isinstance(error, FileNotFoundError)
                or self._attempts >= MAX_UPLOAD_ATTEMPTS
            ):
                print(
                    f"warning: MLflow rejected a line of {self._path} ({lines[0]['kind']}): {error}",
                    flush=True,
                )
                return True
            print(f"warning: could not upload metrics to MLflow, retrying: {error}", flush=True)
            return False
        return True

    def _answers(self, client: Any) -> bool:
        """Return whether MLflow is available, and therefore rejects only this line."""
        from mlflow.exceptions import MlflowException

        try:
            client.get_run(self._run_id)
        except (MlflowException, OSError) as error:
            return getattr(error, "error_code", None) in REFUSALS
        return True

    def _read_sent(self) -> int:
        """Return the number of bytes that earlier attempts have uploaded to this run.

        What was sent but not recorded is sent again, without effect.
        """
        try:
            run_id, place = self._sent_path.read_text().split()
        except (OSError, ValueError):
            return 0
        length = self._path.stat().st_size if self._path.exists() else 0
        return min(int(place), length) if run_id == self._run_id and place.isdigit() else 0

    def _write_sent(self) -> None:
        atomic_write(self._sent_path, f"{self._run_id} {self._sent}", durable=False)


def _read(file: BinaryIO) -> list[dict[str, Any]]:
    """Read complete lines: metrics up to the limit of one call, others alone."""
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
    """Send lines of one kind; sending them again has no effect."""
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
        case "identity":  # read by the outbox only
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
    """Upload a saved model of the run, or continue an earlier upload."""
    from mlflow.entities import LoggedModelOutput

    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    # A model that exists is from an interrupted upload, and is continued.
    models = [model for model in found if model.name == name]
    model = models[0] if models else client.create_logged_model(experiment_id, name, source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])


def main() -> None:
    """Upload until standard input ends, and then the rest."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.tracking.uploader", description="Send a run's outboxes to MLflow."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("url")
    parser.add_argument("run_id")
    arguments = parser.parse_args()
    # One short try per call: the threads of this process retry.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.nice(10)  # training has priority
    from trainer.tracking.system_metrics import SystemMetrics

    system = Outbox(arguments.folder, SYSTEM_FILE)
    with ExitStack() as stack:
        drains = [
            stack.enter_context(MlflowUploader(path, arguments.url, arguments.run_id))
            for path in (arguments.folder / OUTBOX_FILE, system.path)
        ]
        with SystemMetrics(system):
            # The pipe closes without DONE if the trainer is killed.
            is_done = sys.stdin.buffer.read() == DONE
        if not is_done:
            for drain in drains:
                drain.seconds_to_finish = ORPHAN_TIMEOUT_SECONDS
    for drain in drains:
        if drain.unsent_bytes:
            print(
                f"warning: {drain.unsent_bytes} bytes of metrics were not uploaded to MLflow; "
                f"they remain in {arguments.folder}",
                flush=True,
            )


if __name__ == "__main__":
    main()
