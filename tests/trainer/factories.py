"""Training by a spec in a test's own process, or on the ranks that it spawned."""

import os
import signal

import torch
import torch.distributed as dist

from trainer.checkpoint.checkpoints import Checkpoints
from trainer.data import open_dataset
from trainer.distributed import RankInfo
from trainer.jobspec import DigitsSpec, JobSpec, MlpSpec, SgdSpec
from trainer.training.loop import train
from trainer.worker import identity


class Notes:
    """A journal that keeps what it is told."""

    def __init__(self):
        self.metrics = {}
        self.probes = {}
        self.steps = []
        self.resumed_from = None
        self.refused = []

    def resume(self, checkpoint, refused):
        self.resumed_from = checkpoint.step if checkpoint else None
        self.refused = list(refused)

    def log(self, step, metrics, kind="evaluation"):
        (self.probes if kind == "probes" else self.metrics)[step] = dict(metrics)

    def update(self, step):
        self.steps.append(step)


class InterruptedRunError(Exception):
    """What stands in for a fault."""


class Interrupting(Notes):
    """A journal that ends its process, or raises, after some step."""

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
    """This process's place: one of the ranks, or alone."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return RankInfo(rank, world_size, torch.device("cpu"))


def run_here(spec, folder=None, *, journal=None, notices=None):
    """Train as one of the ranks, or alone, with checkpoints in `folder` if there is one; return the result and what was noted."""
    worker, notes = here(), journal or Notes()
    dtype = torch.float64 if spec.precision == "fp64" else torch.float32
    dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, dtype)
    checkpoints = Checkpoints(str(folder), spec.checkpoint, identity(spec, dataset.digest), worker) if folder else None
    try:
        return train(spec, worker, notes, dataset, checkpoints, notices), notes
    finally:
        if folder:
            checkpoints.close()
        dataset.close()


def train_here(spec, folder=None):
    """Train as one of the ranks, or alone; return what the model holds, the last metrics and what was noted."""
    result, notes = run_here(spec, folder)
    state = {name: value.clone() for name, value in result.model.state_dict().items()}
    return state, result.metrics, notes.metrics
