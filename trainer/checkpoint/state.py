"""Training state and progress, with everything that a resumed run needs."""

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

EARLIER_NAMES = {"evaluated": "last_eval_step", "stale": "evals_since_best"}
"""Fields of TrainProgress by their names in checkpoints of earlier versions."""


@dataclass
class TrainProgress:
    """Progress of a run, equal on every worker except for `seconds` (rank 0's clock)."""

    step: int = 0
    """Completed optimizer steps, which is the number of the next batch."""
    last_eval_step: int = -1
    seconds: float = 0.0
    """Training time over all attempts."""
    loss_sum: float = 0.0
    samples: int = 0
    """Samples since the last evaluation. The training loss is `loss_sum / samples`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the newest evaluation."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Statistics of the newest evaluation if it did not use the model's own; exported models contain them."""
    best: dict[str, float] = field(default_factory=dict)
    """Best value by the early stopping criterion, under the name of the criterion; a changed criterion starts
    without a best value.
    """
    best_kept: dict[str, float] = field(default_factory=dict)
    """Best value by the criterion for keeping checkpoints, under the name of the criterion."""
    evals_since_best: int = 0
    """Evaluations since `best`."""
    schedule_start: int = 0
    """First step of the learning rate schedule; `schedule_end` is its last one."""
    schedule_end: int = 0

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set the fields that a checkpoint contains."""
        for name, value in content.items():
            setattr(self, EARLIER_NAMES.get(name, name), value)


@dataclass
class TrainState:
    """Parts of a run that change, as one worker sees them."""

    model: nn.Module
    """Model as built, or sharded, without DistributedDataParallel around it."""
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    probes: Probes
    position: TrainProgress
    worker: RankInfo

    def shared(self) -> dict[str, Any] | None:
        """Return the state that all workers share on rank 0, and None on the others.

        Collective if the model is sharded.
        """
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
        """Return the state of this worker alone: buffers and random states.

        Buffers differ between workers under local statistics.
        """
        numpy_state: Any = np.random.get_state(legacy=True)
        name, keys, *rest = numpy_state
        return {
            "buffers": {name: buffer.to("cpu", copy=True) for name, buffer in self.model.named_buffers()},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.worker.device)
            if self.worker.device.type == "cuda"
            else None,
            "numpy": [name, keys.tolist(), *rest],
            "python": random.getstate(),
        }

    def restore(self, shared: dict[str, Any], own: dict[str, Any] | None) -> None:
        """Load a checkpoint.

        Without `own`, as for another number of workers, random generators are seeded from the step.
        """
        load_model_state(self.model, shared["model"])
        load_optimizer_state(self.optimizer, shared["optimizer"])
        self.schedule.load_state_dict(shared["schedule"])
        self.scaler.load_state_dict(shared["scaler"])
        self.probes.load_state_dict(shared["probes"])
        self.position.load_state_dict(shared["position"])
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
        name, keys, *rest = own["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        random.setstate(own["python"])


def seed_everything(worker: RankInfo, seed: int, step: int = 0) -> None:
    """Seed all random generators, with a different seed on each worker.

    Dropout would otherwise be equal on all workers.
    """
    number = int(np.random.SeedSequence([seed, worker.rank, step]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
