"""From a task to a finished Ray Train run: the trainer's only door to Ray."""

import os
import secrets
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.spec import Outcome, Task, attempt_folder

COLLECTIVE_TIMEOUT_SECONDS = 300
"""A collective that a worker never reaches ends the run after this long, instead of Ray's 30 minutes."""


def run(task: Task, *, ray_address: str | None = None) -> Outcome:
    """Train `task` on as many workers as its spec asks for; `ray_address` as in `ray.init`.

    A failure of training is an outcome with its reason, not an exception. KeyboardInterrupt passes through.
    """
    os.environ.update(
        RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="60",
        RAY_TRAIN_COLLECTIVE_TIMEOUT_S=str(COLLECTIVE_TIMEOUT_SECONDS),
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
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    spec = task.spec
    is_local = ray_address == "local"
    # On this machine alone, workers may be more than cores: slow, but what was asked for.
    cpus = max(os.cpu_count() or 1, spec.num_workers) if is_local else None
    ray.init(address=ray_address, num_cpus=cpus, log_to_driver=True)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if is_local and spec.use_gpu and gpus < spec.num_workers:
            return Outcome(
                state="failed", reason=f"use_gpu: {spec.num_workers} workers need a GPU each, this machine has {gpus}"
            )
        trainer = TorchTrainer(
            _work,
            train_loop_config={"task": task.model_dump_json()},
            torch_config=TorchConfig(backend="nccl" if spec.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
            scaling_config=ScalingConfig(num_workers=spec.num_workers, use_gpu=spec.use_gpu),
            run_config=RunConfig(
                name="ray",
                storage_path=str(attempt_folder(Path(task.context.folder), task.context.attempt)),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        metrics = trainer.fit().return_value
        return Outcome(state="succeeded", reason=f"finished {spec.steps} steps", metrics=metrics)
    except ray.train.TrainingFailedError as error:
        return Outcome(state="failed", reason=_reason(error))
    finally:
        ray.shutdown()


def _reason(error: Exception) -> str:
    """Say in one line which worker failed first in rank order, and of what; the log has the traceback."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return str(error).strip().splitlines()[-1]
    rank = min(failures)
    cause: BaseException = failures[rank]
    cause = getattr(cause, "cause", None) or cause.__cause__ or cause
    text = str(cause).strip()
    return text if isinstance(cause, RunError) else f"worker {rank}: {type(cause).__name__}: {text}"


def _work(config: dict[str, Any]) -> dict[str, float]:
    """Run the loop on one worker; rank 0 keeps the journal and saves the model."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from trainer.journal import open_journal
    from trainer.loop import Worker, train

    task = Task.model_validate_json(config["task"])
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), get_device())
    with open_journal(task, worker.rank) as journal:
        model, metrics = train(task.spec, worker, journal)
        if worker.rank == 0:
            torch.save(model.state_dict(), attempt_folder(Path(task.context.folder), task.context.attempt) / "model.pt")
    return metrics
