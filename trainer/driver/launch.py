"""Launch of Ray Train worker groups, and their restarts."""

import logging
import os
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkpoint.copy_latest import copy_latest_checkpoint
from trainer.driver.history import HISTORY_FILE, RunHistory, checkpoint_folder
from trainer.driver.supervisor import EXITS_VARIABLE
from trainer.errors import ConfigurationError, DataError
from trainer.failure_kinds import classify, message, printable
from trainer.failures import Death, explain, find_exits, has_processes, note_process, read
from trainer.jobspec import (
    SAVING_FILE,
    STOP_FILE,
    TASK_FILE,
    AttemptTask,
    JobSpec,
    NotAllowed,
    Outcome,
    RayDataSpec,
    attempt_folder,
    worker_log_file,
)
from trainer.logs import redirect_output
from trainer.tracking.progress_file import read_step
from trainer.worker_settings import worker_variables

FAILURES_FOLDER = "failures"
RESTARTED = ("worker_lost", "preempted", "hang")
"""Failure kinds after which the workers are restarted from the last checkpoint."""
RESOURCE_TIMEOUT_SECONDS = 300.0
"""Time for the cluster to provide nodes for the minimum number of workers; Ray itself would wait without
limit in an elastic job.
"""
SAVE_TIMEOUT_SECONDS = 5.0
"""Time to finish writing a checkpoint when the job is cancelled; Ray kills the driver 10 s after the signal.
"""
MAX_RESTARTS = 3
"""Maximum number of consecutive restarts without progress."""


def run(task: AttemptTask, *, ray_address: str | None = None) -> Outcome:
    """Train `task` and return its outcome; `ray_address` is that of `ray.init`.

    The workers, as many as the specification asks for, read the task file. A failure of training is an
    outcome with a failure kind, not an exception. After failures of the cluster, the workers are restarted
    from the last checkpoint as long as they make progress. KeyboardInterrupt passes through.
    """
    try:
        task.context.permissions.check(task.spec)
    except NotAllowed as error:
        return Outcome(state="failed", reason=str(error), cause="configuration")
    os.environ.update(
        RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="60",
        RAY_TRAIN_COLLECTIVE_TIMEOUT_S=str(task.spec.collective_timeout_seconds),
        RAY_CHDIR_TO_TRIAL_DIR="0",
        RAY_TRAIN_ENABLE_PRINT_PATCH="0",
        RAY_COLOR_PREFIX="0",
        RAY_DEDUP_LOGS="0",
        RAY_USAGE_STATS_ENABLED="0",
    )
    if ray_address == "local":
        # Otherwise Ray writes a token for its new cluster into the user's home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    spec = task.spec
    is_local = ray_address == "local"
    # On one machine there may be more workers than cores: slow, but as requested.
    readers = 1 if isinstance(spec.data, RayDataSpec) else 0
    cpus = max(os.cpu_count() or 1, spec.max_workers + readers) if is_local else None
    # Under the service, workers write to files; by hand, Ray prints their output.
    level = logging.INFO if is_local else logging.WARNING
    ray.init(
        address=ray_address,
        num_cpus=cpus,
        include_dashboard=False if is_local else None,
        log_to_driver=is_local,
        logging_level=level,
    )
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if is_local and spec.use_gpu and gpus < spec.min_workers:
            machine = f"{spec.min_workers} workers on a machine with {gpus} GPUs"
            reason = f"use_gpu: must be false for {machine} (got true)"
            return Outcome(state="failed", reason=reason, cause="configuration")
        try:
            copy_latest_checkpoint(task)
            history = RunHistory(checkpoint_folder(task), task)
        except (ImportError, ValueError) as error:  # fsspec: unknown protocol, or its package is missing
            address = spec.checkpoint.address
            reason = f"checkpoint.address: must be an address that fsspec supports: {error} (got {address!r})"
            return Outcome(state="failed", reason=reason, cause="configuration")
        try:
            logs = None if is_local else attempt_folder(Path(task.context.folder), task.context.attempt)
            with _feeder(task.spec, logs) as feeder:
                outcome = _run_with_restarts(
                    task, history, {"feeder": feeder, "logs": str(logs) if logs else None}
                )
        except (ConfigurationError, DataError) as error:
            outcome = Outcome(state="failed", reason=str(error), cause=error.cause)
        try:
            history.end(outcome)
        except Exception as error:  # storages raise errors of any class; the outcome must not be lost
            print(f"warning: could not write {HISTORY_FILE}: {message(error)}", flush=True)
        return outcome
    finally:
        ray.shutdown()


@contextmanager
def _feeder(spec: JobSpec, logs: Path | None) -> Iterator[Any]:
    """Start the feeder of streamed data; yield None for other data."""
    if not isinstance(spec.data, RayDataSpec):
        yield None
        return
    from trainer.data.stream import start_feeder, stop_feeder

    feeder = start_feeder(spec, logs)
    try:
        yield feeder
    finally:
        stop_feeder(feeder)


def _run_with_restarts(task: AttemptTask, history: RunHistory, given: dict[str, Any]) -> Outcome:
    furthest, restarts = -1, 0
    for number in range(1_000_000):
        if not _has_room(task.spec):
            reason = f"the cluster has too few resources for {task.spec.min_workers} workers"
            return Outcome(state="failed", reason=reason, cause="worker_lost", step=max(furthest, 0))
        outcome = _fit(task, number, given)
        if outcome.cause not in RESTARTED or is_stop_requested(task):
            return outcome
        step = outcome.step or 0
        restarts = restarts + 1 if step <= furthest else 1
        furthest = max(furthest, step)
        if restarts > MAX_RESTARTS:
            break
        history.restart(outcome)
        print(f"{outcome.cause}: {outcome.reason}; restarting from the last checkpoint", flush=True)
    return outcome


def is_stop_requested(task: AttemptTask) -> bool:
    """Return whether the service has asked the attempt to end."""
    return (attempt_folder(Path(task.context.folder), task.context.attempt) / STOP_FILE).exists()


def _has_room(spec: JobSpec) -> bool:
    """Wait until the cluster has resources for the minimum number of workers.

    Resources count whether or not they are in use. Ray's autoscaler is asked for them: it adds no nodes for
    workers that nobody has requested yet.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    resource = "GPU" if spec.use_gpu else "CPU"

    def is_enough() -> bool:
        return bool(ray.cluster_resources().get(resource, 0) >= spec.min_workers)

    if is_enough():
        return True
    worker: dict[str, float] = {"GPU": 1, "CPU": 1} if spec.use_gpu else {"CPU": 1}
    if spec.accelerator_type is not None:
        worker[f"accelerator_type:{spec.accelerator_type}"] = 0.001  # as Ray Train requests it
    deadline = time.monotonic() + RESOURCE_TIMEOUT_SECONDS
    try:
        # All workers and not the missing ones alone: Ray counts the nodes that are there.
        request_resources(bundles=[worker] * spec.min_workers)
        while not is_enough():
            if time.monotonic() > deadline:
                return False
            time.sleep(1.0)
        return True
    finally:
        request_resources(bundles=[])  # it would keep the nodes after the job


def _fit(task: AttemptTask, number: int, given: dict[str, Any]) -> Outcome:
    """Run Ray Train once.

    `given` is passed to each worker: the feeder and the folder of logs.
    """
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig

    spec = task.spec
    folder = attempt_folder(Path(task.context.folder), task.context.attempt)
    failures_folder = folder / FAILURES_FOLDER / str(number)
    failures_folder.mkdir(parents=True, exist_ok=True)
    workers: Any = spec.num_workers if isinstance(spec.num_workers, int) else tuple(spec.num_workers)
    trainer = _trainer_class()(
        _work,
        # The path and not the task: Ray shows this configuration to everyone with its token, and the task
        # contains another token.
        train_loop_config={"task": str(folder / TASK_FILE), "failures": str(failures_folder)} | given,
        torch_config=TorchConfig(
            backend="nccl" if spec.use_gpu else "gloo", timeout_s=spec.collective_timeout_seconds
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=spec.use_gpu,
            placement_strategy=spec.placement.upper(),
            accelerator_type=spec.accelerator_type,
        ),
        run_config=RunConfig(
            name=f"ray-{number}",
            storage_path=str(folder),
            worker_runtime_env={
                "py_executable": shlex.join(
                    [sys.executable, "-m", "trainer.driver.supervisor", sys.executable]
                ),
                "env_vars": {EXITS_VARIABLE: str(failures_folder)} | worker_variables(spec),
            },
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            callbacks=[_wait_before_abort(folder / SAVING_FILE)],
        ),
    )
    try:
        with _limited_start(failures_folder) as is_late:
            return Outcome.model_validate(trainer.fit().return_value)
    except TrainingFailedError as error:
        return _explain(error, failures_folder, task)
    except (KeyboardInterrupt, SystemExit, RayError):
        if not is_late.is_set():
            raise
        reason = f"no {spec.min_workers} workers were free within {RESOURCE_TIMEOUT_SECONDS:.0f} s"
        return Outcome(state="failed", reason=reason, cause="worker_lost")


def _trainer_class() -> Any:
    """Return TorchTrainer without two actors that jobs do not use.

    DatasetsCallback starts a DatasetManager, but the feeder streams data. PlacementGroupCleanerCallback
    starts an actor that outlives the driver to remove its placement group, which Ray does at the end of the
    driver's job.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

    return Trainer


def _wait_before_abort(marker: Path) -> Any:
    """Return a callback of Ray Train that lets a checkpoint finish before an abort."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class WaitForCheckpoint(WorkerGroupCallback):  # type: ignore[misc]
        def before_worker_group_abort(self, worker_group_context: Any) -> None:
            wait_while_saving(marker, SAVE_TIMEOUT_SECONDS)

    return WaitForCheckpoint()


def wait_while_saving(marker: Path, timeout_seconds: float) -> None:
    """Wait until the checkpoint that is being written is finished, up to a limit."""
    before, deadline = _read(marker), time.monotonic() + timeout_seconds
    while before is not None and _read(marker) == before and time.monotonic() < deadline:
        time.sleep(0.05)


def _read(marker: Path) -> str | None:
    try:
        return marker.read_text()
    except OSError:
        return None


@contextmanager
def _limited_start(failures_folder: Path) -> Iterator[threading.Event]:
    """Interrupt Ray Train if no worker has started in time.

    For an elastic job, it would wait for free resources without limit.
    """
    is_late, is_over = threading.Event(), threading.Event()

    def watch() -> None:
        if not is_over.wait(RESOURCE_TIMEOUT_SECONDS) and not has_processes(failures_folder):
            is_late.set()
            os.kill(os.getpid(), signal.SIGINT)  # Ray Train stops on SIGINT

    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=watch, name="start", daemon=True).start()
    try:
        yield is_late
    finally:
        is_over.set()
        signal.signal(signal.SIGINT, handler)  # Ray Train does not restore the handler


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """Run the training function on one worker.

    The driver refers to it by name and does not load its imports.
    """
    from ray.train import get_context

    rank = get_context().get_world_rank()
    if config["logs"] is not None:
        redirect_output(Path(config["logs"]) / worker_log_file(rank))
    note_process(Path(config["failures"]), rank)
    from trainer.worker import work

    return work(config)


def _explain(error: Any, failures_folder: Path, task: AttemptTask) -> Outcome:
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import ControllerError, PreemptionError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    step = read_step(attempt_folder(Path(task.context.folder), task.context.attempt))
    if isinstance(error, PreemptionError):
        return Outcome(state="failed", reason=printable(error), cause="preempted", step=step)
    if isinstance(error, ControllerError):
        cause, _ = classify(error.controller_failure, default="unknown")
        reason = f"the workers could not be started: {_first_line(error.controller_failure)}"
        return Outcome(state="failed", reason=reason, cause=cause, step=step)
    causes = {
        rank: getattr(failure, "health_check_failure", None) or failure
        for rank, failure in getattr(error, "worker_failures", {}).items()
    }
    # A worker that does not answer is on a node that is cut off, before Ray declares the node dead.
    ends = (RayActorError, OutOfMemoryError, WorkerHealthCheckTimeoutError)
    dead = {rank: cause for rank, cause in causes.items() if isinstance(cause, ends)}
    exits = find_exits(failures_folder, list(dead))
    deaths = {
        rank: Death(
            detail=_first_line(cause) if rank not in exits else printable(cause),
            out_of_memory=isinstance(cause, OutOfMemoryError),
            exit=exits.get(rank),
        )
        for rank, cause in dead.items()
    }
    return explain(read(failures_folder), deaths, step=step)


def _first_line(error: BaseException) -> str:
    return (message(error).strip().splitlines() or [type(error).__name__])[0]
