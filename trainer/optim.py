"""Optimisers by name."""

import torch
from torch import nn

from trainer.spec import SgdSpec


def build_optimizer(spec: SgdSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser; weight decay acts on weight matrices alone, not on biases or the norm's scale and shift."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)
