"""Evaluation over all workers: each test sample counts once."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data import Dataset, shard

EVALUATION_BATCH = 1_000


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, rank: int, world_size: int) -> Iterator[tuple[str, float]]:
    """Yield (`accuracy`, share of test samples) and (`test_loss`, mean cross-entropy in nats), equal on every worker.

    Issues one broadcast of rank 0's buffers and one reduction of three numbers. Where workers have statistics of their own
    (mode `batch`), those of rank 0 are used, as DistributedDataParallel does.
    """
    share_buffers(model, world_size)
    was_training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64, device=dataset.test_labels.device)
    mine = shard(np.arange(len(dataset.test_labels)), rank, world_size)
    for start in range(0, len(mine), EVALUATION_BATCH):
        part = torch.from_numpy(mine[start : start + EVALUATION_BATCH]).to(total.device)
        logits, labels = model(dataset.test_inputs[part]), dataset.test_labels[part]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        total += torch.stack([(logits.argmax(1) == labels).sum(), loss, torch.tensor(len(labels), device=loss.device)])
    model.train(was_training)
    correct, loss_sum, count = sum_over_workers(total, world_size).tolist()
    yield "accuracy", correct / count
    yield "test_loss", loss_sum / count


def share_buffers(model: nn.Module, world_size: int) -> None:
    """Give every worker rank 0's buffers. Under `sync` they agree already, and this changes nothing."""
    if world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def sum_over_workers(values: Tensor, world_size: int) -> Tensor:
    """Sum `values` over all workers, in place."""
    if world_size > 1:
        dist.all_reduce(values)
    return values
