"""State of a run: everything that a resumed run needs."""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from trainer.checkpoint.state_dict import (
    gather_model_state,
    gather_optimizer_state,
    load_model_state,
    load_optimizer_state,
)
from trainer.distributed import RankInfo
from trainer.probes import Probes


@dataclass
class TrainProgress:
    """How far a run is; the same on every worker, but for `seconds`, which rank 0 counts."""

    step: int = 0
    """Optimiser steps done: the next batch is that of this number."""
    evaluated: int = -1
    """The newest step that was evaluated."""
    seconds: float = 0.0
    """Time spent training, over all attempts."""
    loss_sum: float = 0.0
    samples: int = 0
    """What the next evaluation's training loss is the quotient of."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the newest evaluation."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Of the newest evaluation, where it did not use the model's own: what an exported model holds in their place."""
    best: dict[str, float] = field(default_factory=dict)
    """Best value by the early stop's criterion, under its name: after another has taken its place, it counts no more."""
    best_kept: dict[str, float] = field(default_factory=dict)
    """Best value by the criterion by which checkpoints are kept, likewise."""
    stale: int = 0
    """Evaluations since `best`."""
    schedule_start: int = 0
    """First step of the learning rate's schedule, and the step that it ends at."""
    schedule_end: int = 0


@dataclass
class TrainState:
    """The parts of a run that change: a worker's own view of them."""

    model: nn.Module
    """As it was built, or sharded: not its wrapping."""
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    probes: Probes
    position: TrainProgress
    worker: RankInfo

    def shared(self) -> dict[str, Any] | None:
        """Collect what all workers have in common; the dictionary on rank 0, None on others. With shards, a collective."""
        keep = self.worker.rank == 0
        content: dict[str, Any] = {
            "model": gather_model_state(self.model, keep=keep),
            "optimizer": gather_optimizer_state(self.optimizer, keep=keep),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "probes": self.probes.state_dict(),
            "position": asdict(self.position),
        }
        return content if keep else None

    def own(self) -> dict[str, Any]:
        """Collect what is this worker's alone: buffers, which differ where statistics are its own, and random numbers."""
        numpy_state: Any = np.random.get_state(legacy=True)
        name, keys, *place = numpy_state
        return {
            "buffers": {name: buffer.to("cpu", copy=True) for name, buffer in self.model.named_buffers()},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.worker.device) if self.worker.device.type == "cuda" else None,
            "numpy": [name, keys.tolist(), *place],
            "python": random.getstate(),
        }

    def restore(self, shared: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Load a checkpoint. Without `own`, as for another number of workers, random generators are seeded again."""
        load_model_state(self.model, shared["model"])
        load_optimizer_state(self.optimizer, shared["optimizer"])
        self.schedule.load_state_dict(shared["schedule"])
        self.scaler.load_state_dict(shared["scaler"])
        self.probes.load_state_dict(shared["probes"])
        for name, value in shared["position"].items():
            setattr(self.position, name, value)
        if own is None:
            seed_everything(self.worker, torch.initial_seed(), self.position.step)
            return
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, value in own["buffers"].items():
                buffers[name].copy_(value)
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"], self.worker.device)
        name, keys, *place = own["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *place))
        random.setstate(own["python"])


def seed_everything(worker: RankInfo, seed: int, step: int = 0) -> None:
    """Seed all sources of random numbers, differently for each worker, so that dropout differs between them."""
    number = int(np.random.SeedSequence([seed, worker.rank, step]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
