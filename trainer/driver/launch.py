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
from trainer.driver.history import MANIFEST_FILE, RunHistory, checkpoint_folder
from trainer.driver.supervisor import EXITS_VARIABLE
from trainer.errors import InvalidInput
from trainer.failure_kinds import classify, message, printable
from trainer.failures import Death, explain, find_exits, has_processes, note_process, read
from trainer.jobspec import (
    SAVING_FILE,
    TASK_FILE,
    JobSpec,
    NotAllowed,
    Outcome,
    RayDataSpec,
    Task,
    attempt_folder,
    worker_log_file,
)
from trainer.logs import redirect_output
from trainer.tracking.progress_file import read_step

FAILURES_FOLDER = "failures"
RESTARTED = ("worker_lost", "preempted", "hang")
"""Causes that another try on other processes, from the last checkpoint, can mend."""
SECONDS_FOR_ROOM = 300.0
"""What the cluster has to come to enough nodes for the fewest workers; Ray itself would wait for an elastic job's for ever."""
SECONDS_TO_SAVE = 5.0
"""Limit for a checkpoint that is being written when the job is cancelled; Ray kills the driver 10 s after the signal."""
MOST_RESTARTS = 3
"""Restarts in a row that come no further than the one before."""


def run(task: Task, *, ray_address: str | None = None) -> Outcome:
    """Train `task` on as many workers as its spec asks for, which read it from its task file; `ray_address` as in `ray.init`.

    A failure of training is an outcome with its cause, not an exception. Where the cluster is to blame, the workers are started
    again from the last checkpoint, as long as they get further. KeyboardInterrupt passes through.
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
        # Ray would otherwise write a token for its new cluster into the user's home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    spec = task.spec
    is_local = ray_address == "local"
    # On this machine alone, workers may be more than cores: slow, but what was asked for.
    readers = 1 if isinstance(spec.data, RayDataSpec) else 0
    cpus = max(os.cpu_count() or 1, spec.max_workers + readers) if is_local else None
    # Workers of a service's job write to files of their own; by hand, their output is Ray's to show.
    level = logging.INFO if is_local else logging.WARNING
    ray.init(address=ray_address, num_cpus=cpus, log_to_driver=is_local, logging_level=level)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if is_local and spec.use_gpu and gpus < spec.min_workers:
            reason = f"use_gpu: {spec.min_workers} workers need a GPU each, this machine has {gpus}"
            return Outcome(state="failed", reason=reason, cause="configuration")
        try:
            copy_latest_checkpoint(task)
            manifest = RunHistory(checkpoint_folder(task), task)
        except (ImportError, ValueError) as error:  # of fsspec: no such protocol, or its package is not installed
            reason = f"checkpoint.address: {error} (got {spec.checkpoint.address!r})"
            return Outcome(state="failed", reason=reason, cause="configuration")
        try:
            logs = None if is_local else attempt_folder(Path(task.context.folder), task.context.attempt)
            with _feeder(task.spec, logs) as feeder:
                outcome = _run_until_it_stays(task, manifest, {"feeder": feeder, "logs": str(logs) if logs else None})
        except InvalidInput as error:
            outcome = Outcome(state="failed", reason=str(error), cause=error.cause)
        try:
            manifest.end(outcome)
        except Exception as error:  # of any storage; the outcome must not be lost by it
            print(f"warning: {MANIFEST_FILE} could not be written: {message(error)}", flush=True)
        return outcome
    finally:
        ray.shutdown()


@contextmanager
def _feeder(spec: JobSpec, logs: Path | None) -> Iterator[Any]:
    """Start what reads streamed data for all workers; None for other data."""
    if not isinstance(spec.data, RayDataSpec):
        yield None
        return
    from trainer.data.stream import start_feeder, stop_feeder

    feeder = start_feeder(spec, logs)
    try:
        yield feeder
    finally:
        stop_feeder(feeder)


def _run_until_it_stays(task: Task, manifest: RunHistory, given: dict[str, Any]) -> Outcome:
    furthest, restarts = -1, 0
    for number in range(1_000_000):
        if not _has_room(task.spec):
            reason = f"the cluster has no room for {task.spec.min_workers} workers"
            return Outcome(state="failed", reason=reason, cause="worker_lost", step=max(furthest, 0))
        outcome = _fit(task, number, given)
        if outcome.cause not in RESTARTED:
            return outcome
        step = outcome.step or 0
        restarts = restarts + 1 if step <= furthest else 1
        furthest = max(furthest, step)
        if restarts > MOST_RESTARTS:
            break
        manifest.restart(outcome)
        print(f"{outcome.cause}: {outcome.reason}; starting again from the last checkpoint", flush=True)
    return outcome


def _has_room(spec: JobSpec) -> bool:
    """Wait until the cluster's nodes have resources for the fewest workers, used by others or not."""
    import ray

    resource = "GPU" if spec.use_gpu else "CPU"
    deadline = time.monotonic() + SECONDS_FOR_ROOM
    while ray.cluster_resources().get(resource, 0) < spec.min_workers:
        if time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def _fit(task: Task, number: int, given: dict[str, Any]) -> Outcome:
    """Run Ray Train once; `given` is what the driver hands on to each worker: the feeder, and the folder of logs."""
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    spec = task.spec
    folder = attempt_folder(Path(task.context.folder), task.context.attempt)
    failures_folder = folder / FAILURES_FOLDER / str(number)
    failures_folder.mkdir(parents=True, exist_ok=True)
    workers: Any = spec.num_workers if isinstance(spec.num_workers, int) else tuple(spec.num_workers)
    trainer = TorchTrainer(
        _work,
        # The path, not the task: Ray shows this configuration to whoever has its token, and the task holds another one.
        train_loop_config={"task": str(folder / TASK_FILE), "failures": str(failures_folder)} | given,
        torch_config=TorchConfig(backend="nccl" if spec.use_gpu else "gloo", timeout_s=spec.collective_timeout_seconds),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=spec.use_gpu),
        run_config=RunConfig(
            name=f"ray-{number}",
            storage_path=str(folder),
            worker_runtime_env={
                "py_executable": f"{shlex.quote(sys.executable)} -m trainer.driver.supervisor {shlex.quote(sys.executable)}",
                "env_vars": {EXITS_VARIABLE: str(failures_folder)},
            },
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
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
        reason = f"no {spec.min_workers} workers were free within {SECONDS_FOR_ROOM:.0f} s"
        return Outcome(state="failed", reason=reason, cause="worker_lost")


def _wait_before_abort(marker: Path) -> Any:
    """Make a callback of Ray Train's controller that lets a checkpoint be finished before the workers are killed."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class WaitForCheckpoint(WorkerGroupCallback):  # type: ignore[misc]
        def before_worker_group_abort(self, worker_group_context: Any) -> None:
            wait_while_saving(marker, SECONDS_TO_SAVE)

    return WaitForCheckpoint()


def wait_while_saving(marker: Path, timeout_seconds: float) -> None:
    """Wait as long as the checkpoint that is being written now is not finished, up to a limit."""
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
    """End Ray Train's run if no worker has started in time: for an elastic job, it would wait for free resources for ever."""
    is_late, is_over = threading.Event(), threading.Event()

    def watch() -> None:
        if not is_over.wait(SECONDS_FOR_ROOM) and not has_processes(failures_folder):
            is_late.set()
            os.kill(os.getpid(), signal.SIGINT)  # what Ray Train ends itself by

    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=watch, name="start", daemon=True).start()
    try:
        yield is_late
    finally:
        is_over.set()
        signal.signal(signal.SIGINT, handler)  # Ray Train's own stays otherwise


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """Work on one worker; the driver, which hands this on by name, does not load what it takes."""
    from ray.train import get_context

    rank = get_context().get_world_rank()
    if config["logs"] is not None:
        redirect_output(Path(config["logs"]) / worker_log_file(rank))
    note_process(Path(config["failures"]), rank)
    from trainer.worker import work

    return work(config)


def _explain(error: Any, failures_folder: Path, task: Task) -> Outcome:
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train import ControllerError, PreemptionError

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
    dead = {rank: cause for rank, cause in causes.items() if isinstance(cause, (RayActorError, OutOfMemoryError))}
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
