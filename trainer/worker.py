"""Training function that Ray Train runs on each worker."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ParamSpec

import torch

from trainer import failures
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress
from trainer.data import Dataset, open_dataset
from trainer.data.class_folders import list_some
from trainer.distributed import RankInfo
from trainer.driver.history import checkpoint_folder
from trainer.errors import Diverged, ExportError, StorageError
from trainer.export import ExportedModel, collect_models, export_model, write_weights
from trainer.failure_kinds import message
from trainer.jobspec import (
    RESUME_KEY_FIELDS,
    SAVING_FILE,
    STOP_FILE,
    AttemptTask,
    JobSpec,
    Norm,
    attempt_folder,
)
from trainer.secrets import hide_credentials, set_variables
from trainer.tracking.figures import write_figures
from trainer.tracking.logger import MetricsLogger, RankZeroLogger, open_logger
from trainer.tracking.outbox import Outbox
from trainer.training.loop import train

P = ParamSpec("P")


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker and return the result.

    The result has `state`, `reason`, `cause`, `step` and `metrics`; that of rank 0 counts. Divergence is a
    result. Other errors are recorded here and raised in Ray, which ends the other workers.
    """
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    worker = RankInfo(context.get_world_rank(), context.get_world_size(), get_device())
    print(
        f"worker {worker.rank} of {worker.world_size} on {socket.gethostname()}, process {os.getpid()}",
        flush=True,
    )
    position = TrainProgress()
    try:
        task = read_task(Path(config["task"]))
        # Timeout of the layers, which they read on construction.
        os.environ["SYNCBN_TIMEOUT_SECONDS"] = str(task.spec.collective_timeout_seconds)
        return _train(task, worker, position, config.get("feeder"), Path(config["failures"]))
    except Diverged as error:
        return {
            "state": "succeeded",
            "reason": str(error),
            "cause": "diverged",
            "step": error.step,
            "metrics": position.metrics,
        }
    except BaseException as error:
        reason = failures.record(Path(config["failures"]), error, worker.rank, position.step)
        # A new error: Ray cannot transfer every error, and treats SystemExit as the end of its own worker.
        raise RuntimeError(reason) from None


def read_task(path: Path) -> AttemptTask:
    """Read an attempt's task file. Raises StorageError if this node cannot."""
    try:
        return AttemptTask.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"the task file {path} cannot be read on {socket.gethostname()}: {error.strerror}"
        ) from error


def _train(
    task: AttemptTask, worker: RankInfo, position: TrainProgress, feeder: Any, failures_folder: Path
) -> dict[str, Any]:
    spec, context = task.spec, task.context
    dtype = torch.float64 if spec.precision == "fp64" else torch.float32
    folder = attempt_folder(Path(context.folder), context.attempt)
    with ExitStack() as stack:
        logger = stack.enter_context(open_logger(task, worker.rank))
        # Inside the logger's context, which waits for MLflow on exit: records need the time of the failure.
        stack.enter_context(failures.recorded(failures_folder, worker.rank, position))
        # After the start of the upload process, which does not need the secrets.
        hide_credentials()
        set_variables(context.secrets)
        dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, dtype, feeder)
        stack.callback(_try_to, "close the dataset", dataset.close)
        run_identity = identity(spec, dataset.digest)
        if isinstance(logger, RankZeroLogger):
            logger.outbox.belong_to(run_identity)
            describe(logger.outbox, spec, worker, dataset, folder)
        checkpoints = Checkpoints(
            checkpoint_folder(task), spec.checkpoint, run_identity, worker, folder / SAVING_FILE
        )
        stack.callback(_try_to, "close the checkpoints", checkpoints.close)
        stack.enter_context(failures.recorded(failures_folder, worker.rank, position))  # before that waits
        try:
            result = train(spec, worker, logger, dataset, checkpoints, RayNotices(folder), position)
        except Diverged:  # a result, too
            _conclude(spec, worker, logger, dataset, folder)
            raise
        _conclude(spec, worker, logger, dataset, folder)
        models = collect_models(spec, result.model, position, checkpoints, worker)
        if isinstance(logger, RankZeroLogger):
            log_to_mlflow = context.mlflow_run_id is not None and spec.log_model
            export(spec, models, dataset, logger.outbox if log_to_mlflow else None, folder)
    return {
        "state": "succeeded",
        "reason": f"finished {spec.steps} steps"
        if result.end == "finished"
        else f"{result.end} after {result.step} of {spec.steps} steps",
        "step": result.step,
        "metrics": result.metrics,
    }


def export(
    spec: JobSpec, models: list[ExportedModel], dataset: Dataset, outbox: Outbox | None, folder: Path
) -> None:
    """Write the weights of each model, and log the models to MLflow.

    Without `outbox`, they are not logged. Raises ExportError.
    """
    if spec.norm in (Norm.BATCH, Norm.SYNC) and spec.evaluation.statistics == "batch":
        print(
            "warning: the exported model uses moving averages; "
            "it was evaluated with statistics of each test batch",
            flush=True,
        )
    for model in models:
        print(f"{model.name}.pt: {model.which} model, step {model.step}", flush=True)
        try:
            write_weights(model.weights, folder / f"{model.name}.pt")
        except Exception as error:  # torch's writer raises its own error for a full disk
            raise ExportError(model.step, f"{type(error).__name__}: {message(error)}") from error
    if outbox is not None:
        _try_to("log the model to MLflow", log_models, spec, models, dataset, outbox, folder)


def log_models(
    spec: JobSpec, models: list[ExportedModel], dataset: Dataset, outbox: Outbox, folder: Path
) -> None:
    """Log the models to MLflow, if the dataset has an example of an input."""
    example = next((batch.inputs[:2] for batch in dataset.test() if len(batch.labels)), None)
    if example is None:
        return
    outbox.put("tags", tags={"exported_model": f"{models[0].which}, step {models[0].step}"})
    for model in models:
        path = folder / model.name
        if export_model(spec, model.weights, dataset, example, path):
            outbox.put("model", path=str(path), step=model.step, name=model.name)


def _conclude(spec: JobSpec, worker: RankInfo, logger: MetricsLogger, dataset: Dataset, folder: Path) -> None:
    """Log tags and figures of the run; every worker calls it."""
    if getattr(spec.data, "corrupt_images", "refuse") == "skip":
        skipped = count_skipped(dataset, worker)
        if isinstance(logger, RankZeroLogger):
            _try_to("log the skipped images", logger.outbox.put, "tags", tags={"skipped_images": skipped})
    if isinstance(logger, RankZeroLogger):
        _try_to("draw the figures", log_figures, logger.outbox, folder / "figures")


def log_figures(outbox: Outbox, folder: Path) -> None:
    """Draw the figures of the run and log them to MLflow."""
    for figure in write_figures(outbox.path, folder):
        outbox.put("artifact", path=str(figure), folder="figures")


def _try_to(what: str, call: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
    """Call a function that a finished run does not depend on; log its error."""
    try:
        call(*arguments, **options)
    except Exception as error:
        print(f"warning: could not {what}: {type(error).__name__}: {message(error)}", flush=True)


def describe(outbox: Outbox, spec: JobSpec, worker: RankInfo, dataset: Dataset, folder: Path) -> None:
    """Log properties of the run that the specification does not contain."""
    tags = {"workers": worker.world_size, "device": worker.device.type, "torch": torch.__version__}
    outbox.put("tags", tags=tags)
    source = getattr(spec.data, "root", None) or getattr(spec.data, "train", None) or spec.data.name
    outbox.put("dataset", name=spec.data.name, digest=dataset.digest, source=source)
    if dataset.class_names:
        names = list(dataset.class_names)
        print(f"{len(names)} classes in label order: {list_some(names)}", flush=True)
        path = folder / "classes.json"
        path.write_text(json.dumps(names, ensure_ascii=False, indent=1))
        outbox.put("artifact", path=str(path), folder="data")


def count_skipped(dataset: Dataset, worker: RankInfo) -> int:
    """Return the number of distinct corrupt images that workers have skipped.

    Every worker calls it. Collectives: one.
    """
    return len(frozenset().union(*worker.all_gather_object(dataset.skipped_images)))


class RayNotices:
    """Ray's notices of lost nodes, and the service's request to stop."""

    def __init__(self, folder: Path) -> None:
        self._stop_file = folder / STOP_FILE

    def is_preempted(self) -> bool:
        """Query Ray; a separate collective distributes rank 0's answer to all workers."""
        import ray.train

        return ray.train.get_preemption_info() is not None

    def is_stop_requested(self) -> bool:
        """Return whether the service has made the file that asks the attempt to stop."""
        with suppress(OSError):  # the next poll looks again
            return self._stop_file.exists()
        return False


def identity(spec: JobSpec, data_digest: str) -> dict[str, str]:
    """Return the values that a checkpoint must have to belong to this run."""
    content = spec.model_dump(mode="json")
    # A run that met a corrupt image may resume without it; the steps before are the same.
    content["data"].pop("corrupt_images", None)
    return {field: json.dumps(content[field], sort_keys=True) for field in RESUME_KEY_FIELDS} | {
        "data's content": data_digest
    }
