"""Measurements for tests of probes."""

import copy
import math

import torch
import torch.nn.functional as F

from tests.trainer.factories import here
from trainer.data import Batch
from trainer.jobspec import MlpSpec
from trainer.models import build_model
from trainer.probes import Probes

RATE = 0.3


RELU = MlpSpec(hidden=[16, 12], init_std=0.3, activation="relu")


def make_model(spec, shape=(64,)):
    return build_model(spec.model, spec.norm, shape, 10, spec.seed).double()


def make_batch(count=50, shape=(64,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(count, *shape, generator=generator, dtype=torch.float64),
        torch.randint(10, (count,), generator=generator),
    )


def measure(spec, *batches, shape=(64,)):
    """Measure on consecutive batches and return the last measurement."""
    probes = Probes(spec, make_model(spec, shape), here())
    return [probes.measure([batch], RATE) for batch in batches][-1]


def differentiate(model, batch):
    loss = F.cross_entropy(model(batch.inputs), batch.labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def step(model, gradients, rate, names=None):
    """Return a copy of the model after a step of all or some parameters."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if names is None or name in names:
                parameter -= rate * gradients[name]
    return moved


def norm_of(vectors):
    return math.sqrt(sum(float(vector.square().sum()) for vector in vectors))
