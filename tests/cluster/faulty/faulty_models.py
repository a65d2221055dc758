"""Models that fail on purpose, mounted into the containers of the tests."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn

PAUSE_SECONDS = 0.01
"""Delay per batch, so that faults from outside meet a running job."""


def raise_error():
    return {}["weights"]


def exit_process():
    os._exit(7)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def exhaust_memory():
    return torch.empty(2**50, dtype=torch.uint8)


def hang():
    time.sleep(3_600)


def diverge():
    return float("nan")


FAULTS = {
    function.__name__: function
    for function in (raise_error, exit_process, crash, exhaust_memory, hang, diverge)
}


class Faulty(nn.Sequential):
    """Network of one hidden layer with a fault at a training batch of one rank."""

    def __init__(self, fault, rank, at):
        super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
        self.fault, self.rank, self.at, self.batches = FAULTS.get(fault), rank, at, 0

    def forward(self, x):
        factor = None
        if self.training:
            time.sleep(PAUSE_SECONDS)
            self.batches += 1
            if self.fault and dist.get_rank() == self.rank and self.batches == self.at:
                factor = self.fault()
        result = super().forward(x)
        return result if factor is None else result * factor


def faulty(fault=None, rank=0, at=0):
    return Faulty(fault, rank, at)
