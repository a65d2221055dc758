"""Networks that tests import by name."""

import time
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn


class Backwards(nn.Module):
    """Network that calls its layers in another order than it defines them, so that gradients arrive in
    another order.
    """

    def __init__(self, widths):
        super().__init__()
        self.output = nn.Linear(widths[-1], 10)
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for width in widths])
        self.layers = nn.ModuleList(
            [nn.Linear(inputs, outputs) for inputs, outputs in zip([64, *widths], widths, strict=False)]
        )

    def forward(self, x):
        x = x.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        return self.output(x)


def backwards():
    return Backwards([24, 16, 12])


def a_list():
    return [1]


BUILT = []


def renamed():
    """Build a network whose parameter names differ at each call."""
    BUILT.append(f"layer{len(BUILT)}")
    return nn.Sequential(OrderedDict([("flatten", nn.Flatten()), (BUILT[-1], nn.Linear(64, 10))]))


def mistaken():
    return {}["weights"]


class Slow(nn.Sequential):
    """Network with a delay per training batch, so that the cluster can change meanwhile."""

    def __init__(self, seconds):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        self.seconds = seconds

    def forward(self, x):
        if self.training:
            time.sleep(self.seconds)
        return super().forward(x)


def slow(seconds):
    return Slow(seconds)


class BreaksOnOne(nn.Sequential):
    """Network that outputs NaN in one training step on one rank."""

    def __init__(self, rank, step):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.rank, self.steps_left = rank, step

    def forward(self, x):
        output = super().forward(x)
        if self.training:
            self.steps_left -= 1
            if self.steps_left == 0 and dist.get_rank() == self.rank:
                return output * float("nan")
        return output


def breaks_on_one(rank, step):
    return BreaksOnOne(rank, step)


class Unused(nn.Module):
    """Network with one layer that is never used, and one that is used in every other training step."""

    def __init__(self, sometimes):
        super().__init__()
        self.first, self.norm, self.output = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.never, self.sometimes = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.every = 2 if sometimes else 1

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1))).relu()
        if int(self.passes) % self.every == 0:
            x = x + self.sometimes(x)
        self.passes += self.training
        return self.output(x)


def unused(sometimes):
    return Unused(sometimes)
