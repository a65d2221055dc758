"""Driver: `python -m trainer`, inside a Ray job or by hand with SPEC.yaml.

Inside a Ray job, SYNCBN_JOB is the path of the task file.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import psutil
from pydantic import ValidationError

from trainer.atomic import atomic_write
from trainer.driver.heartbeat import AttemptLock
from trainer.driver.supervisor import ProcessExit, supervise
from trainer.failure_kinds import classify, classify_exit, message, printable
from trainer.jobspec import (
    JOB_VARIABLE,
    LOG_FILE,
    NOT_STARTED,
    OUTCOME_FILE,
    STORAGE_FAILED,
    TASK_FILE,
    Allowlist,
    AttemptContext,
    AttemptTask,
    JobSpec,
    Outcome,
    attempt_folder,
    field_path,
    read_yaml,
    spec_warnings,
)
from trainer.logs import indexed_logs, redirect_output
from trainer.processes import Descendants, describe_status, die_with_parent

NOT_UNDERSTOOD, INTERRUPTED = 2, 130
WITHOUT_OUTCOME = (NOT_UNDERSTOOD, NOT_STARTED, STORAGE_FAILED, INTERRUPTED)
"""Exit statuses of a driver that leaves no outcome."""


def main() -> int:
    """Run one task and return the exit code.

    0: succeeded, 1: failed, 2: invalid task, 3: not to be started, 4: the storage failed, 130: interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer", description="Train one spec on a local Ray, without the service."
    )
    parser.add_argument("spec", type=Path, nargs="?", help="YAML file with a JobSpec")
    parser.add_argument(
        "--output", type=Path, help="folder for metrics, checkpoints and model; default: runs/SPEC-TIME"
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in the output folder"
    )
    arguments = parser.parse_args()
    try:
        if arguments.spec is not None:
            task = _task_of_file(arguments.spec, arguments.output, resume=arguments.resume)
            atomic_write(_folder(task) / TASK_FILE, task.model_dump_json())
            return _run(task, ray_address="local")
        if JOB_VARIABLE not in os.environ:
            parser.error(f"spec: must be a YAML file, unless the service has set {JOB_VARIABLE}")
        task = AttemptTask.model_validate_json(Path(os.environ[JOB_VARIABLE]).read_bytes())
    except (OSError, ValueError) as error:
        print(f"python -m trainer: {arguments.spec or JOB_VARIABLE}: {error}", file=sys.stderr)
        return NOT_UNDERSTOOD
    try:
        return _run_supervised(task)
    except OSError as error:  # such as a full disk, on which no outcome can be left either
        print(f"python -m trainer: {error}", file=sys.stderr)
        return STORAGE_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run_supervised(task: AttemptTask) -> int:
    """Run the attempt in a child process, and end its descendants.

    Writes the outcome if the child could not.
    """
    started_by = psutil.Process().parent()
    if (driver := os.fork()) == 0:  # safe: there are no threads yet
        die_with_parent()
        return _run_attempt(task)
    descendants = Descendants()
    # Ray signals all processes of a job, including the driver, so signals are not forwarded.
    ended = supervise(descendants, driver, started_by, forward=False)
    file = _folder(task) / OUTCOME_FILE
    is_failure = not ended.stopped and ended.status not in WITHOUT_OUTCOME
    if is_failure and not file.exists():
        outcome = _outcome_of_driver(ended)
        with (_folder(task) / LOG_FILE).open("a") as log:
            log.write(f"ERROR: {outcome.reason}\n")
        atomic_write(file, outcome.model_dump_json())
    descendants.end()
    return ended.status if ended.status >= 0 else 128 - ended.status


def _outcome_of_driver(ended: ProcessExit) -> Outcome:
    """Return the outcome of a driver that left none; it runs no user code."""
    at = time.strftime("%H:%M:%S", time.gmtime(ended.seconds))
    memory = ": the node was out of memory" if ended.out_of_memory else ""
    cause = classify_exit(ended.status, out_of_memory=ended.out_of_memory)
    return Outcome(
        state="failed",
        reason=f"the driver {describe_status(ended.status)} at {at} UTC{memory}",
        cause="unknown" if cause == "user_code" else cause,
    )


def _run_attempt(task: AttemptTask) -> int:
    folder = _folder(task)
    lock = AttemptLock(Path(task.context.folder), task.context.attempt)
    if (reason := lock.acquire()) is not None:
        print(reason, file=sys.stderr)
        return NOT_STARTED
    try:
        # Ray's own logs are lost with the node.
        print(f"output is redirected to {folder / LOG_FILE}", flush=True)
        with indexed_logs(folder):
            redirect_output(folder / LOG_FILE)
            return _run(task, ray_address=None)
    finally:
        lock.end()


def _run(task: AttemptTask, ray_address: str | None) -> int:
    folder = _folder(task)
    for warning in spec_warnings(task.spec):
        print(f"warning: {warning}", flush=True)
    try:
        from trainer.driver.launch import run

        outcome = run(task, ray_address=ray_address)
    except Exception as error:
        # An error of the trainer or the cluster: the service decides about a retry.
        traceback.print_exc()
        reason, trace = (
            f"driver: {type(error).__name__}: {message(error)}",
            printable(traceback.format_exc(), 20_000),
        )
        cause, _ = classify(error, default="unknown")
        outcome = Outcome(state="failed", reason=reason, cause=cause, traceback=trace)
    atomic_write(folder / OUTCOME_FILE, outcome.model_dump_json())
    print(f"{outcome.state}: {outcome.reason}; files in {folder}", flush=True)
    return 0 if outcome.state == "succeeded" else 1


def _folder(task: AttemptTask) -> Path:
    folder = attempt_folder(Path(task.context.folder), task.context.attempt)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _task_of_file(path: Path, output: Path | None, *, resume: bool) -> AttemptTask:
    content = read_yaml(path)
    try:
        spec = JobSpec.model_validate(content)
    except ValidationError as error:
        raise ValueError(_explain(error, content)) from error
    folder = (output or Path("runs") / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    attempt = 1
    if resume:
        while attempt_folder(folder, attempt).exists():
            attempt += 1
        if attempt == 1:
            raise FileNotFoundError(f"--output: must be the folder of an earlier run (got {folder})")
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"--output: must be an empty folder without --resume (got {folder})")
    # By hand, the permissions of the user apply.
    permissions = Allowlist(everything=True)
    context = AttemptContext(
        job_id=path.stem, attempt=attempt, name=path.stem, folder=str(folder), permissions=permissions
    )
    return AttemptTask(spec=spec, context=context)


def _explain(error: ValidationError, content: object) -> str:
    return "; ".join(
        f"{field_path(e['loc'], content) or 'the file'}: {e['msg'].removeprefix('Value error, ')} "
        f"(got {e['input']!r})"
        for e in error.errors(include_url=False)
    )


if __name__ == "__main__":
    sys.exit(main())
