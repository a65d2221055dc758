"""Training function that Ray Train runs on each worker."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ParamSpec

import torch
import torch.distributed as dist

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
from trainer.jobspec import RESUME_KEY_FIELDS, SAVING_FILE, JobSpec, Norm, Task, attempt_folder
from trainer.secrets import hide_credentials, set_variables
from trainer.tracking.figures import write_figures
from trainer.tracking.logger import MetricsLogger, RankZeroLogger, open_journal
from trainer.tracking.outbox import Outbox
from trainer.training.loop import train

P = ParamSpec("P")


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker; return what rank 0 knows of the end: `state`, `reason`, `cause`, `step`, `metrics`.

    To diverge is a result. Any other error is written down here, where it happens, and passed on to Ray, which ends the others.
    """
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    worker = RankInfo(context.get_world_rank(), context.get_world_size(), get_device())
    print(f"worker {worker.rank} of {worker.world_size} on {socket.gethostname()}, process {os.getpid()}", flush=True)
    position = TrainProgress()
    try:
        task = read_task(Path(config["task"]))
        # The layers' own time limit, which they read when they are made.
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
        # Not the error itself: Ray could not pass on every one, and would take SystemExit for the end of its own worker.
        raise RuntimeError(reason) from None


def read_task(path: Path) -> Task:
    """Read an attempt's task file. Raises StorageError if this node cannot."""
    try:
        return Task.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"the task file {path} cannot be read on {socket.gethostname()}: {error.strerror}"
        ) from error


def _train(task: Task, worker: RankInfo, position: TrainProgress, feeder: Any, failures_folder: Path) -> dict[str, Any]:
    spec, context = task.spec, task.context
    dtype = torch.float64 if spec.precision == "fp64" else torch.float32
    folder = attempt_folder(Path(context.folder), context.attempt)
    with ExitStack() as stack:
        journal = stack.enter_context(open_journal(task, worker.rank))
        # Before the journal waits for MLflow: whoever is first to fail is so at the time it failed.
        stack.enter_context(failures.recorded(failures_folder, worker.rank, position))
        # After the journal has started its process, which has no need of them.
        hide_credentials()
        set_variables(context.secrets)
        dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, dtype, feeder)
        stack.callback(_try_to, "end the loading of data", dataset.close)
        is_what = identity(spec, dataset.digest)
        if isinstance(journal, RankZeroLogger):
            journal.outbox.belong_to(is_what)
            describe(journal.outbox, spec, worker, dataset, folder)
        checkpoints = Checkpoints(checkpoint_folder(task), spec.checkpoint, is_what, worker, folder / SAVING_FILE)
        stack.callback(_try_to, "close the checkpoints", checkpoints.close)
        stack.enter_context(failures.recorded(failures_folder, worker.rank, position))  # before that waits
        try:
            result = train(spec, worker, journal, dataset, checkpoints, RayNotices(), position)
        except Diverged:  # a result, too
            _conclude(spec, worker, journal, dataset, folder)
            raise
        _conclude(spec, worker, journal, dataset, folder)
        models = collect_models(spec, result.model, position, checkpoints, worker)
        if isinstance(journal, RankZeroLogger):
            log_to_mlflow = context.mlflow_run_id is not None and spec.log_model
            export(spec, models, dataset, journal.outbox if log_to_mlflow else None, folder)
    return {
        "state": "succeeded",
        "reason": f"finished {spec.steps} steps"
        if result.end == "finished"
        else f"{result.end} after {result.step} of {spec.steps} steps",
        "step": result.step,
        "metrics": result.metrics,
    }


def export(spec: JobSpec, models: list[ExportedModel], dataset: Dataset, outbox: Outbox | None, folder: Path) -> None:
    """Write the weights of each model, and hand the models to MLflow if there is an outbox for it. Raises ExportError."""
    if spec.norm in (Norm.BATCH, Norm.SYNC) and spec.evaluation.statistics == "batch":
        print("the exported model has moving averages; it was evaluated with statistics of each test batch", flush=True)
    for model in models:
        print(f"{model.name}.pt is the {model.which} model, of step {model.step}", flush=True)
        try:
            write_weights(model.weights, folder / f"{model.name}.pt")
        except Exception as error:  # of torch, too, whose writer has its own for a disk that is full
            raise ExportError(model.step, f"{type(error).__name__}: {message(error)}") from error
    if outbox is not None:
        _try_to("log the model to MLflow", log_models, spec, models, dataset, outbox, folder)


def log_models(spec: JobSpec, models: list[ExportedModel], dataset: Dataset, outbox: Outbox, folder: Path) -> None:
    """Hand the models to MLflow, if the dataset has an example of an input."""
    example = next((batch.inputs[:2] for batch in dataset.test() if len(batch.labels)), None)
    if example is None:
        return
    outbox.put("tags", tags={"exported_model": f"{models[0].which}, step {models[0].step}"})
    for model in models:
        path = folder / model.name
        if export_model(spec, model.weights, dataset, example, path):
            outbox.put("model", path=str(path), step=model.step, name=model.name)


def _conclude(spec: JobSpec, worker: RankInfo, journal: MetricsLogger, dataset: Dataset, folder: Path) -> None:
    """Log tags of the run besides its metrics; called by every worker."""
    if getattr(spec.data, "corrupt_images", "refuse") == "skip":
        skipped = count_skipped(dataset, worker)
        if isinstance(journal, RankZeroLogger):
            _try_to("log the skipped images", journal.outbox.put, "tags", tags={"skipped_images": skipped})
    if isinstance(journal, RankZeroLogger):
        _try_to("draw the figures", log_figures, journal.outbox, folder / "figures")


def log_figures(outbox: Outbox, folder: Path) -> None:
    """Draw the run's own figures and hand them to MLflow."""
    for figure in write_figures(outbox.path, folder):
        outbox.put("artifact", path=str(figure), folder="figures")


def _try_to(what: str, call: Callable[P, object], *arguments: P.args, **options: P.kwargs) -> None:
    """Do what the result of a finished run does not depend on; of an error, the log has a warning."""
    try:
        call(*arguments, **options)
    except Exception as error:
        print(f"warning: could not {what}: {type(error).__name__}: {message(error)}", flush=True)


def describe(outbox: Outbox, spec: JobSpec, worker: RankInfo, dataset: Dataset, folder: Path) -> None:
    """Log what the spec does not say."""
    tags = {"workers": worker.world_size, "device": worker.device.type, "torch": torch.__version__}
    outbox.put("tags", tags=tags)
    source = getattr(spec.data, "root", None) or getattr(spec.data, "train", None) or spec.data.name
    outbox.put("dataset", name=spec.data.name, digest=dataset.digest, source=source)
    if dataset.class_names:
        names = list(dataset.class_names)
        print(f"{len(names)} classes, in the order of their labels: {list_some(names)}", flush=True)
        path = folder / "classes.json"
        path.write_text(json.dumps(names, ensure_ascii=False, indent=1))
        outbox.put("artifact", path=str(path), folder="data")


def count_skipped(dataset: Dataset, worker: RankInfo) -> int:
    """Count the corrupt images that any worker has left out, each once. Every worker calls it: one collective."""
    names = [dataset.skipped_images] * worker.world_size
    if worker.world_size > 1:
        dist.all_gather_object(names, dataset.skipped_images)
    return len(frozenset().union(*names))


class RayNotices:
    """Ray's own notices of nodes that are drained or reclaimed."""

    def is_preempted(self) -> bool:
        """Ask Ray, by a collective of its own that hands every worker rank 0's answer."""
        import ray.train

        return ray.train.get_preemption_info() is not None


def identity(spec: JobSpec, data_digest: str) -> dict[str, str]:
    """Name what a checkpoint must agree on to be this run's."""
    content = spec.model_dump(mode="json")
    # So that a run that met a corrupt image can go on without it: what comes before is the same.
    content["data"].pop("corrupt_images", None)
    return {field: json.dumps(content[field], sort_keys=True) for field in RESUME_KEY_FIELDS} | {
        "data's content": data_digest
    }
