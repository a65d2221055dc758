"""The trained model, as files that others can read."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from trainer.worker import Worker


def export_weights(model: nn.Module, path: Path, worker: Worker) -> None:
    """Write the whole model's state_dict by rank 0; where it is sharded, all workers bring their parts."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if worker.rank == 0:
        part = path.with_name(f".{path.name}.part")
        torch.save(weights, part)
        part.replace(path)
