"""Training by a spec in the process of a test, or on the ranks that it started."""

import os
import signal

import torch
import torch.distributed as dist

from trainer.checkpoint.checkpoints import Checkpoints
from trainer.data import open_dataset
from trainer.distributed import RankInfo
from trainer.jobspec import TRAIN_SECONDS, DigitsSpec, JobSpec, MlpSpec, SgdSpec
from trainer.training.loop import train
from trainer.worker import identity

DEVICE = os.environ.get("SYNCBN_TEST_DEVICE", "cpu")
"""Device on which specs are trained; `make test-gpu` sets `cuda`."""


class RecordingLogger:
    """Metrics logger that keeps all values; times, which no two runs share, on their own."""

    def __init__(self):
        self.metrics = {}
        self.seconds = {}
        self.probes = {}
        self.steps = []
        self.resumed_from = None
        self.refused = []

    def resume(self, checkpoint, refused):
        self.resumed_from = checkpoint.step if checkpoint else None
        self.refused = list(refused)

    def log(self, step, metrics, kind="evaluation"):
        values = dict(metrics)
        if kind == "evaluation":
            self.seconds[step] = values.pop(TRAIN_SECONDS)
        (self.probes if kind == "probes" else self.metrics)[step] = values

    def update(self, step):
        self.steps.append(step)


class InterruptedRunError(Exception):
    """Stand-in for a fault."""


class Interrupting(RecordingLogger):
    """Metrics logger that kills its process, or raises, after some step."""

    def __init__(self, step, *, kill=False):
        super().__init__()
        self.at, self.kill = step, kill

    def update(self, step):
        super().update(step)
        if step == self.at and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.at:
            raise InterruptedRunError


def make_spec(**changes):
    values = {
        "model": MlpSpec(hidden=[16, 16], init_std=0.3),
        "data": DigitsSpec(),
        "norm": "sync",
        "global_batch_size": 50,
        "steps": 20,
        "eval_every": 10,
        "optimizer": SgdSpec(lr=0.5, momentum=0.9),
        "precision": "fp64",
    }
    return JobSpec.model_validate(values | changes)


def here():
    """Return the rank info of this process: one of the ranks, or the only one."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    index = rank % torch.cuda.device_count() if DEVICE == "cuda" else None
    return RankInfo(rank, world_size, torch.device(DEVICE, index))


def run_here(spec, folder=None, *, metrics_logger=None, notices=None):
    """Train as one of the ranks, or alone, with checkpoints in `folder` if given.

    Returns the result and the logged values.
    """
    worker, notes = here(), metrics_logger or RecordingLogger()
    dtype = torch.float64 if spec.precision == "fp64" else torch.float32
    dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, dtype)
    checkpoints = (
        Checkpoints(str(folder), spec.checkpoint, identity(spec, dataset.digest), worker) if folder else None
    )
    try:
        return train(spec, worker, notes, dataset, checkpoints, notices), notes
    finally:
        if folder:
            checkpoints.close()
        dataset.close()


def train_here(spec, folder=None):
    """Train as one of the ranks, or alone; return model state, last metrics and logged values."""
    result, notes = run_here(spec, folder)
    state = {name: value.clone() for name, value in result.model.state_dict().items()}
    return state, result.metrics, notes.metrics
