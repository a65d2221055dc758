"""The training loop, read from top to bottom."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.data import batch_indices, load_dataset, shard
from trainer.errors import Diverged
from trainer.evaluate import evaluate, sum_over_workers
from trainer.models import build_model
from trainer.optim import build_optimizer
from trainer.spec import JobSpec
from trainer.tracking import Journal

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Worker:
    """This process's place among the workers. With more than one, torch's default process group is initialised."""

    rank: int
    world_size: int
    device: torch.device


def train(spec: JobSpec, worker: Worker, journal: Journal) -> tuple[nn.Module, dict[str, float]]:
    """Train by `spec` and return the model and its last metrics; every worker calls it and gets the same metrics.

    Each step's loss is the mean over the global batch. DistributedDataParallel averages gradients over W workers, so a worker's
    share is the sum over its own samples times W/n: exact also where the batch cannot be divided evenly.

    Raises Diverged, on every worker at the same step, if the loss is not finite when it is evaluated.
    """
    dtype = DTYPES[spec.precision]
    dataset = load_dataset(spec.data, dtype, worker.device)
    samples, features = len(dataset.train_labels), dataset.train_inputs[0].numel()
    model = build_model(spec.model, spec.norm, features, dataset.classes, spec.seed).to(worker.device, dtype)
    parallel: nn.Module = model
    if worker.world_size > 1:
        # Synchronised statistics agree already, and a broadcast each step would cost a collective; evaluation shares the buffers.
        parallel = DistributedDataParallel(model, forward_sync_buffers=False)
    optimizer = build_optimizer(spec.optimizer, model)
    metrics: dict[str, float] = {}
    train_loss = torch.zeros((), dtype=torch.float64, device=worker.device)
    seen = 0

    for step in range(spec.steps + 1):
        if step % spec.eval_every == 0 or step == spec.steps:
            metrics = dict(evaluate(model, dataset, worker.rank, worker.world_size))
            if seen:
                metrics["train_loss"] = sum_over_workers(train_loss, worker.world_size).item() / seen
                train_loss.zero_()
                seen = 0
            if not all(math.isfinite(value) for value in metrics.values()):
                raise Diverged(f"diverged: the loss is not finite after {step} steps ({metrics})")
            journal.log(step, metrics)
        journal.update(step)
        if step == spec.steps:
            break

        batch = batch_indices(samples, spec.global_batch_size, step, spec.seed)
        mine = torch.from_numpy(shard(batch, worker.rank, worker.world_size)).to(worker.device)
        logits = parallel(dataset.train_inputs[mine])
        loss_sum = F.cross_entropy(logits, dataset.train_labels[mine], reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        share = loss_sum * (worker.world_size / spec.global_batch_size)
        share.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        train_loss += loss_sum.detach()
        seen += spec.global_batch_size

    return model, metrics
